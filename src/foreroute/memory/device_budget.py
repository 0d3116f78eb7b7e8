"""Compute how much GPU and host memory experts may take, with errors that tell the user what to change.

Everything else that a run needs is counted first, so that memory does not run out after the first token.
"""

from dataclasses import dataclass

from foreroute.errors import BudgetError, DeviceError
from foreroute.units import format_memory, parse_memory

# Allocations come in blocks, and freed ones do not always fit new ones: share of the whole memory, and the least.
_FRAGMENTED_SHARE, _LEAST_FRAGMENTED_BYTES = 0.03, 256 * 2**20
# cuBLAS workspaces, kernel code and the like, which no allocator reports. An estimate.
_LIBRARY_BYTES = 192 * 2**20
# The private pool of captured graphs per row of the largest batch, without its logits. An estimate.
_GRAPH_ROW_BYTES = 8 * 2**20
# Left for the system and for Python where the host's share is chosen automatically.
_HOST_RESERVE_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class DeviceNeeds:
    """GPU memory that a model needs beside its experts; all in bytes.

    dense_bytes: the dense part. kv_bytes: the KV cache of the whole context, for every row.
    prefill_bytes: activations and logits of one chunk. buffer_bytes: prefill's layer buffers.
    max_rows: largest captured batch, 0 without graphs.
    """

    dense_bytes: int
    kv_bytes: int
    prefill_bytes: int
    buffer_bytes: int = 0
    max_rows: int = 0

    @property
    def graph_bytes(self) -> int:
        """The graphs' private pool."""
        return self.max_rows * _GRAPH_ROW_BYTES

    def all_bytes(self, total_bytes: int) -> int:
        """The sum, with what a GPU of `total_bytes` loses to libraries and fragmentation."""
        lost = max(int(total_bytes * _FRAGMENTED_SHARE), _LEAST_FRAGMENTED_BYTES) + _LIBRARY_BYTES
        return self.dense_bytes + self.kv_bytes + self.prefill_bytes + self.buffer_bytes + self.graph_bytes + lost


def prefill_bytes(chunk: int, hidden: int, vocabulary: int, itemsize: int) -> int:
    """Activations (`hidden` wide) and logits (`vocabulary` wide, in fp32 too) of a prefill of `chunk` tokens, at
    `itemsize` bytes a number. An estimate."""
    return chunk * (16 * hidden * itemsize + vocabulary * (itemsize + 4))


def check_dense(needs: DeviceNeeds, free_bytes: int, total_bytes: int) -> None:
    """Check that `needs` fit in `free_bytes` of a GPU of `total_bytes`.

    Raises:
        DeviceError: they do not; says what would.
    """
    wanted = needs.all_bytes(total_bytes)
    if wanted > free_bytes:
        prefill = format_memory(needs.prefill_bytes + needs.buffer_bytes)
        raise DeviceError(
            f"The GPU has {format_memory(free_bytes)} free of {format_memory(total_bytes)}; without a single expert "
            f"the model needs {format_memory(wanted, round_up=True)}: dense weights "
            f"{format_memory(needs.dense_bytes)}, KV cache {format_memory(needs.kv_bytes)}, prefill {prefill}; the "
            f"rest is graphs, libraries and fragmentation. {_advice(needs)}"
        )


def choose_device_memory(
    asked: int | str | None, needs: DeviceNeeds, free_bytes: int, total_bytes: int, whole_bytes: int, least_bytes: int
) -> int:
    """Bytes for experts on the GPU: as asked, or all that `needs` leave of `free_bytes` (GPU: `total_bytes`).

    Args:
        asked: as --memory. whole_bytes: all experts' slots. least_bytes: one token's.
    Raises:
        DeviceError: the rest does not fit, or leaves too little for one token.
        BudgetError: not an amount, or more than is left.
    """
    check_dense(needs, free_bytes, total_bytes)
    left = free_bytes - needs.all_bytes(total_bytes)
    if asked is not None:
        wanted = min(parse_memory(asked, whole_bytes), whole_bytes)
        if wanted > left:
            raise BudgetError(
                f"--memory {asked} is {format_memory(wanted)}; beside dense weights, KV cache and reserves the GPU has "
                f"{format_memory(left)} left. Lower it, leave it out to have it chosen, or: {_advice(needs)}"
            )
        return wanted
    if left < least_bytes:
        raise DeviceError(
            f"Beside dense weights, KV cache and reserves the GPU has {format_memory(left)} left; one token's experts "
            f"need {format_memory(least_bytes, round_up=True)}. {_advice(needs)}"
        )
    return min(left, whole_bytes)


def choose_host_records(
    asked: int | str | None, available_bytes: int, record_bytes: int, num_records: int, *, must_hold_all: bool
) -> int:
    """Number of experts to hold in host memory; the others stay on disk.

    Args:
        asked: as --host-memory. available_bytes: free RAM. record_bytes: per expert. num_records: all experts.
        must_hold_all: the device fetches experts itself, and cannot read a disk.
    Raises:
        DeviceError: too little. BudgetError: not an amount.
    """
    whole = num_records * record_bytes
    if asked is None:
        wanted = min(whole, max(0, available_bytes - _HOST_RESERVE_BYTES))
    else:
        wanted = min(parse_memory(asked, whole), whole)
        if wanted > available_bytes:
            raise DeviceError(
                f"--host-memory {asked} is {format_memory(wanted)}; this machine has {format_memory(available_bytes)} "
                "free. Lower it: what is beyond it stays on disk."
            )
    held = wanted // record_bytes
    if held < num_records and must_hold_all:
        raise DeviceError(
            f"The host has room for {held} of {num_records} experts ({format_memory(wanted)} of "
            f"{format_memory(whole)}), and with --control device all of them must fit. Use --control host: it "
            "reads the others from disk. Or pack the experts with fewer bits (foreroute pack --quant q4_k)."
        )
    if held < 1:
        raise DeviceError(
            f"{format_memory(wanted)} of host memory hold no expert of {format_memory(record_bytes)}. Raise "
            "--host-memory, or close other programs."
        )
    return held


def _advice(needs: DeviceNeeds) -> str:
    """Advise to reduce what takes the most first."""
    if needs.kv_bytes > needs.dense_bytes:
        return "Lower --kv-tokens, or use a larger GPU."
    if needs.prefill_bytes > needs.dense_bytes:
        return "Lower --prefill-chunk, or use a larger GPU."
    return "Use a smaller --dtype (bfloat16), a lower --kv-tokens and --prefill-chunk, or a larger GPU."
