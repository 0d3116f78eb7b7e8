"""How many slots a memory budget buys, said so that the user can act on it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from foreroute.errors import BudgetError

_UNIT_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_FORM = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>%|[a-z]*)", re.IGNORECASE | re.ASCII)
_ACCEPTED = (
    'Write bytes (8589934592), a number with a unit ("8GiB", "1.5 GiB", "512MiB", "8GB"), '
    'or a share of the experts ("25%").'
)


def parse_memory(memory: str | int, total_expert_bytes: int) -> int:
    """Bytes that the user asked for, rounded down.

    Args:
        memory: bytes, or text: "8GiB" (2**30), "8GB" (10**9), "1.5 GiB", "512MiB", "25%"; case does not matter.
        total_expert_bytes: what 100 % stands for.
    Raises:
        BudgetError: it is none of these, not above zero, or above 100 %.
    """
    if not isinstance(memory, str | int):
        raise BudgetError(f"{memory!r} is not an amount of memory. {_ACCEPTED}")
    form = _FORM.fullmatch(str(memory).strip())
    unit = form["unit"].lower() or "b" if form else ""
    if form is None or unit not in {*_UNIT_BYTES, "%"}:
        raise BudgetError(f"{memory!r} is not an amount of memory. {_ACCEPTED}")
    number = Fraction(form["number"])
    if unit == "%":
        if number > 100:
            raise BudgetError(f"{memory!r} is more than all experts. {_ACCEPTED}")
        wanted = number / 100 * total_expert_bytes
    else:
        wanted = number * _UNIT_BYTES[unit]
    if wanted < 1:
        raise BudgetError(f"{memory!r} is no memory at all. {_ACCEPTED}")
    return int(wanted)


def format_memory(num_bytes: int, *, round_up: bool = False) -> str:
    """Bytes as `parse_memory` reads them, one decimal in the largest unit that fits: "1.2 GiB".

    Args:
        num_bytes: not negative.
        round_up: True where the text must stand for at least so many bytes; else it is the nearest.
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        unit_bytes = _UNIT_BYTES[unit.lower()]
        if num_bytes >= unit_bytes:
            tenths = (num_bytes * 10 + (unit_bytes - 1 if round_up else unit_bytes // 2)) // unit_bytes
            return f"{tenths // 10}.{tenths % 10} {unit}"
    return f"{num_bytes} B"


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """The pool that a budget buys.

    num_slots: slots in the pool.
    staging_slots: the most of them that guesses may take.
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


def plan_slots(
    budget_bytes: int,
    slot_bytes: int,
    num_experts_total: int,
    per_layer_top_k: Sequence[int],
    *,
    reserved_bytes: int = 0,
) -> SlotPlan:
    """The largest pool within the budget, never larger than there are experts.

    Staging is an eighth of the pool, but at least one layer's top-k (a whole guess fits) and at most two (guesses for
    one layer arrive while those for the layer before are used). It shrinks where the rest could not hold one layer's
    top-k, and is 0 when every expert is resident: there is nothing left to guess.

    Args:
        budget_bytes: what the user allows.
        slot_bytes: length of one slot.
        num_experts_total: experts in all layers.
        per_layer_top_k: experts that one token uses, per MoE layer.
        reserved_bytes: the part of the budget that is not for slots.
    Raises:
        BudgetError: the pool cannot hold what one token needs, so that under LRU it would hit nothing.
    """
    assert slot_bytes > 0, "a slot has a length"
    assert min(per_layer_top_k, default=0) > 0, "there are MoE layers, and each uses an expert"
    top_k = max(per_layer_top_k)
    token_demand_slots = sum(per_layer_top_k)
    assert token_demand_slots <= num_experts_total, "a token uses no expert twice"
    num_slots = min(num_experts_total, max(0, budget_bytes - reserved_bytes) // slot_bytes)
    if num_slots < token_demand_slots:
        enough = format_memory(reserved_bytes + token_demand_slots * slot_bytes, round_up=True)
        held = f"{num_slots} slot" if num_slots == 1 else f"{num_slots} slots"
        raise BudgetError(
            f"{format_memory(budget_bytes)} holds {held}; one token needs {token_demand_slots}. "
            f"Raise --memory to {enough}."
        )
    staging_slots = min(max(num_slots // 8, top_k), 2 * top_k, num_slots - top_k)
    if num_slots == num_experts_total:
        staging_slots = 0
    return SlotPlan(num_slots, staging_slots, token_demand_slots, slot_bytes)
