"""What of a GPU's memory experts may have, and what of the host's: said so that the user can act on it.

Everything else that a run will want is counted first, so that nothing runs out of memory after the first token.
"""

from dataclasses import dataclass

from foreroute.errors import BudgetError, DeviceError
from foreroute.units import format_memory, parse_memory

# Allocations come in blocks, and free ones do not fit each other: of the whole memory, and at least.
_FRAGMENTED_SHARE, _LEAST_FRAGMENTED_BYTES = 0.03, 256 * 2**20
# cuBLAS workspaces, kernels' code and the like, which no allocator shows. An estimate.
_LIBRARY_BYTES = 192 * 2**20
# What the private pool of captured graphs holds per row of the largest batch, beside its logits. An estimate.
_GRAPH_ROW_BYTES = 8 * 2**20
# Left to the system and to Python where the host's share is chosen here.
_HOST_RESERVE_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class DeviceNeeds:
    """What a model wants of a GPU beside its experts; all in bytes.

    dense_bytes: weights that are no experts. kv_bytes: the cache of the whole context, for every row.
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
        """All of it, with what a GPU of so much memory loses to libraries and fragmentation."""
        lost = max(int(total_bytes * _FRAGMENTED_SHARE), _LEAST_FRAGMENTED_BYTES) + _LIBRARY_BYTES
        return self.dense_bytes + self.kv_bytes + self.prefill_bytes + self.buffer_bytes + self.graph_bytes + lost


def prefill_bytes(chunk: int, hidden: int, vocabulary: int, itemsize: int) -> int:
    """Activations and logits of a chunk of so many tokens: logits once as computed and once in fp32. An estimate."""
    return chunk * (16 * hidden * itemsize + vocabulary * (itemsize + 4))


def check_dense(needs: DeviceNeeds, free_bytes: int, total_bytes: int) -> None:
    """See that what is no expert fits.

    Raises:
        DeviceError: it does not; says what would.
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
    """Bytes for experts on the GPU: what was asked for, or all that is left.

    Args:
        asked: as --memory. whole_bytes: of all experts' slots. least_bytes: of one token's.
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
    """Experts that the host's memory holds; the others stay on disk.

    Args:
        asked: as --host-memory. available_bytes: free RAM. num_records: experts in all.
        must_hold_all: the device fetches by itself, and cannot ask a disk.
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
            f"{format_memory(whole)}), and with --control device all of them have to be there. Use --control host: it "
            "reads the others from disk. Or pack the experts with fewer bits (foreroute pack --codec int4)."
        )
    if held < 1:
        raise DeviceError(
            f"{format_memory(wanted)} of host memory hold no expert of {format_memory(record_bytes)}. Raise "
            "--host-memory, or close other programs."
        )
    return held


def _advice(needs: DeviceNeeds) -> str:
    """What takes the most is what to lessen first."""
    if needs.kv_bytes > needs.dense_bytes:
        return "Lower --kv-tokens, or use a larger GPU."
    if needs.prefill_bytes > needs.dense_bytes:
        return "Lower --prefill-chunk, or use a larger GPU."
    return "Use a smaller --dtype (bfloat16), a lower --kv-tokens and --prefill-chunk, or a larger GPU."
