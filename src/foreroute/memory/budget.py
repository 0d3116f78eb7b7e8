"""Compute how many slots a memory budget buys, with errors that tell the user what to change."""

from collections.abc import Sequence
from dataclasses import dataclass

from foreroute.errors import BudgetError
from foreroute.types import SlotClass
from foreroute.units import format_memory


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """The slot pool that a budget buys.

    classes: its slots by length, the longest first; one where all layers' experts are of about one length.
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
