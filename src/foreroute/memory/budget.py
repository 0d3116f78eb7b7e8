"""Compute how many slots a memory budget buys, with errors that tell the user what to change."""

from collections.abc import Sequence
from dataclasses import dataclass

from foreroute.errors import BudgetError
from foreroute.units import format_memory


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """The slot pool that a budget buys.

    num_slots: slots in the pool.
    staging_slots: the most of them that prefetched experts may take before they are used.
    token_demand_slots: distinct experts that one token uses, over all layers.
    slot_bytes: length of one slot.
    """

    num_slots: int
    staging_slots: int
    token_demand_slots: int
    slot_bytes: int

    @property
    def pool_bytes(self) -> int:
        """Bytes of all slots."""
        return self.num_slots * self.slot_bytes


def plan_slots(budget_bytes: int, slot_bytes: int, num_experts_total: int, per_layer_top_k: Sequence[int]) -> SlotPlan:
    """Plan the largest pool within the budget, with at most one slot per expert.

    Staging is an eighth of the pool, but at least one layer's top-k (a whole guess fits) and at most two (prefetches
    for one layer arrive while those for the layer before are used). It shrinks where the rest could not hold one
    layer's top-k, and is 0 when every expert is resident: nothing is left to prefetch.

    Args:
        budget_bytes: the budget.
        slot_bytes: length of one slot.
        num_experts_total: experts in all layers.
        per_layer_top_k: experts that one token uses, per MoE layer.
    Raises:
        BudgetError: the pool cannot hold what one token needs, so that LRU would never hit.
    """
    assert slot_bytes > 0, "a slot has a length"
    assert min(per_layer_top_k, default=0) > 0, "there are MoE layers, and each uses an expert"
    top_k = max(per_layer_top_k)
    token_demand_slots = sum(per_layer_top_k)
    assert token_demand_slots <= num_experts_total, "a token uses no expert twice"
    num_slots = min(num_experts_total, budget_bytes // slot_bytes)
    if num_slots < token_demand_slots:
        enough = format_memory(token_demand_slots * slot_bytes, round_up=True)
        if budget_bytes == 0:
            # Users never ask for 0 bytes: this budget was chosen automatically.
            raise BudgetError(
                "Too little RAM is free to choose --memory: none is left for experts beside the dense weights and a "
                f"reserve, and one token needs {token_demand_slots}. Close other programs, raise the limit if this is "
                f"a container's, or say what to take all the same: --memory {enough.replace(' ', '')}."
            )
        held = f"{num_slots} slot" if num_slots == 1 else f"{num_slots} slots"
        raise BudgetError(
            f"{format_memory(budget_bytes)} holds {held}; one token needs {token_demand_slots}. "
            f"Raise --memory to {enough}."
        )
    staging_slots = min(max(num_slots // 8, top_k), 2 * top_k, num_slots - top_k)
    if num_slots == num_experts_total:
        staging_slots = 0
    return SlotPlan(num_slots, staging_slots, token_demand_slots, slot_bytes)
