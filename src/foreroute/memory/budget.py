"""Compute how many experts a memory budget buys, in RAM and on a GPU, with errors that tell the user what to change.

On a GPU everything else that a run needs is counted first, so that memory does not run out after the first token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from foreroute.errors import BudgetError, DeviceError
from foreroute.types import SlotClass
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
class SlotPlan:
    """The slot pool that a budget buys.

    classes: its slots by length, the longest first; one where all layers' experts take as many pages.
    token_demand_slots: distinct experts that one token uses, over all layers.
    token_bytes: bytes of the slots that hold these.
    """

    classes: tuple[SlotClass, ...]
    token_demand_slots: int
    token_bytes: int

    @property
    def num_slots(self) -> int:
        """Slots in the pool."""
        return sum(one.num_slots for one in self.classes)

    @property
    def staging_slots(self) -> int:
        """The most slots that prefetched experts may take before they are used."""
        return sum(one.staging_slots for one in self.classes)

    @property
    def slot_bytes(self) -> int:
        """Length of the longest slots."""
        return max(one.slot_bytes for one in self.classes)

    @property
    def pool_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(one.nbytes for one in self.classes)


@dataclass(frozen=True, slots=True)
class _Demand:
    """Layers whose experts have slots of one length. num_experts, token_slots: of all these layers together."""

    slot_bytes: int
    layers: tuple[int, ...]
    num_experts: int
    token_slots: int
    top_k: int

    @property
    def all_bytes(self) -> int:
        """Bytes of slots for all experts."""
        return self.num_experts * self.slot_bytes


def plan_pool(
    budget_bytes: int, slot_lengths: Sequence[int], num_experts: Sequence[int], per_layer_top_k: Sequence[int]
) -> SlotPlan:
    """Plan the largest pool within the budget, with at most one slot per expert.

    Staging is an eighth of the slots of a length, but at least one layer's top-k (a whole guess fits) and at most two
    (prefetches for one layer arrive while those for the layer before are used). It shrinks where the rest could not
    hold one layer's top-k, and is 0 when every expert is resident: nothing is left to prefetch.

    Each length gets slots for the same share of its experts, as far as this holds what one token uses, and one layer's
    top-k of prefetches beside: of a byte more for one length or for another, as much less is read.

    Args:
        slot_lengths, num_experts: by MoE layer.
        per_layer_top_k: experts that one token uses, by MoE layer.
    Raises:
        BudgetError: the pool cannot hold what one token needs, so that LRU would never hit.
    """
    assert min(slot_lengths, default=0) > 0, "there are MoE layers, and a slot has a length"
    assert min(per_layer_top_k, default=0) > 0, "each MoE layer uses an expert"
    demands = []
    for length in sorted(set(slot_lengths), reverse=True):
        layers = tuple(layer for layer, own in enumerate(slot_lengths) if own == length)
        top_k = [per_layer_top_k[layer] for layer in layers]
        demands.append(_Demand(length, layers, sum(num_experts[layer] for layer in layers), sum(top_k), max(top_k)))
    token_slots = sum(demand.token_slots for demand in demands)
    token_bytes = sum(demand.token_slots * demand.slot_bytes for demand in demands)
    assert all(demand.token_slots <= demand.num_experts for demand in demands), "a token uses no expert twice"
    if budget_bytes < token_bytes:
        raise _too_small(budget_bytes, budget_bytes * token_slots // token_bytes, token_slots, token_bytes)
    classes, first, offset = [], 0, 0
    for demand, num_slots in zip(demands, _shares(budget_bytes, demands), strict=True):
        staging = min(max(num_slots // 8, demand.top_k), 2 * demand.top_k, num_slots - demand.top_k)
        if num_slots == demand.num_experts:
            staging = 0
        start = offset - first * demand.slot_bytes
        classes.append(SlotClass(demand.slot_bytes, num_slots, demand.layers, staging, first, start))
        first, offset = first + num_slots, offset + num_slots * demand.slot_bytes
    return SlotPlan(tuple(classes), token_slots, token_bytes)


def _shares(room_bytes: int, demands: Sequence[_Demand]) -> list[int]:
    """Slots of each length: for the same share of its experts, but not fewer than the least that each needs."""
    least = [min(demand.num_experts, max(demand.token_slots, 2 * demand.top_k)) for demand in demands]
    if sum(count * demand.slot_bytes for count, demand in zip(least, demands, strict=True)) > room_bytes:
        least = [demand.token_slots for demand in demands]
    shares = list(least)
    open_ones = list(range(len(demands)))
    while open_ones:
        left = room_bytes - sum(
            shares[at] * demands[at].slot_bytes for at in range(len(demands)) if at not in open_ones
        )
        wanted = sum(demands[at].all_bytes for at in open_ones)
        proportional = {at: min(left, wanted) * demands[at].num_experts // wanted for at in open_ones}
        too_few = [at for at in open_ones if proportional[at] < least[at]]
        if not too_few:
            for at in open_ones:
                shares[at] = proportional[at]
            break
        open_ones = [at for at in open_ones if at not in too_few]
    # What the divisions left over: less than one slot of each length.
    left = room_bytes - sum(count * demand.slot_bytes for count, demand in zip(shares, demands, strict=True))
    for at, demand in enumerate(demands):
        more = min(left // demand.slot_bytes, demand.num_experts - shares[at])
        shares[at] += more
        left -= more * demand.slot_bytes
    return shares


def _too_small(budget_bytes: int, num_slots: int, token_slots: int, enough_bytes: int) -> BudgetError:
    enough = format_memory(enough_bytes, round_up=True)
    if budget_bytes == 0:
        # Users never ask for 0 bytes: this budget was chosen automatically.
        return BudgetError(
            "Too little RAM is free to choose --memory: none is left for experts beside the dense weights and a "
            f"reserve, and one token needs {token_slots}. Close other programs, raise the limit if this is "
            f"a container's, or say what to take all the same: --memory {enough.replace(' ', '')}."
        )
    held = f"{num_slots} slot" if num_slots == 1 else f"{num_slots} slots"
    return BudgetError(
        f"{format_memory(budget_bytes)} holds {held}; one token needs {token_slots}. Raise --memory to {enough}."
    )


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
