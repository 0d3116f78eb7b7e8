"""Slots of several lengths: how a budget is shared among them, and where they lie in the pool."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from foreroute.errors import BudgetError
from foreroute.memory.budget import plan_pool
from foreroute.transfer.memory import allocate_pool
from foreroute.units import parse_memory

PAGE = 4096


def test_a_budget_holds_the_same_share_of_each_length() -> None:
    plan = plan_pool((24 * 128 * 31 + 24 * 128 * 26) // 4, [31, 26] * 24, [128] * 48, [8] * 48)
    assert [(one.slot_bytes, one.num_slots) for one in plan.classes] == [(31, 768), (26, 768)]
    assert [one.staging_slots for one in plan.classes] == [16, 16]
    assert plan.num_slots == 1536 > plan.pool_bytes // 31
    assert (plan.token_demand_slots, plan.token_bytes, plan.slot_bytes) == (384, 192 * 57, 31)


def test_a_layer_by_itself_has_room_for_prefetches_where_there_is_any() -> None:
    lengths, experts, top_k = [60, 40, 40, 40], [64] * 4, [8] * 4
    enough = plan_pool(16 * 60 + 24 * 40, lengths, experts, top_k)
    assert [(one.num_slots, one.staging_slots) for one in enough.classes] == [(16, 8), (24, 8)]
    tight = plan_pool(8 * 60 + 24 * 40, lengths, experts, top_k)
    assert [(one.num_slots, one.staging_slots) for one in tight.classes] == [(8, 0), (24, 8)]


def test_too_small_a_budget_says_what_would_do() -> None:
    with pytest.raises(
        BudgetError, match=r"^60\.0 KiB holds 5 slots; one token needs 6\. Raise --memory to 72\.0 KiB\.$"
    ):
        plan_pool(15 * PAGE, [4 * PAGE, 4 * PAGE, PAGE], [8] * 3, [2] * 3)
    assert plan_pool(18 * PAGE, [4 * PAGE, 4 * PAGE, PAGE], [8] * 3, [2] * 3).num_slots == 6


layers = st.lists(
    st.tuples(st.sampled_from([PAGE, 3 * PAGE, 4 * PAGE]), st.integers(1, 64), st.integers(1, 16)),
    min_size=1,
    max_size=12,
).map(lambda drawn: [(length, max(experts, top_k), top_k) for length, experts, top_k in drawn])


@given(layers=layers, share=st.floats(0, 1.3))
def test_whatever_the_budget(layers: list[tuple[int, int, int]], share: float) -> None:
    """Every length holds a token's demand, a byte more than a slot of each is left, and the advice works."""
    lengths, experts, top_k = (list(column) for column in zip(*layers, strict=True))
    whole = sum(length * count for length, count in zip(lengths, experts, strict=True))
    budget = int(share * whole)
    assume(budget > 0)
    try:
        plan = plan_pool(budget, lengths, experts, top_k)
    except BudgetError as error:
        told = re.search(r"Raise --memory to (.*)\.$", str(error))
        assert told is not None
        budget = parse_memory(told[1], whole)
        plan = plan_pool(budget, lengths, experts, top_k)
    assert plan.pool_bytes <= budget
    left, first, offset = budget - plan.pool_bytes, 0, 0
    for one in plan.classes:
        demand = sum(top_k[layer] for layer in one.layers)
        held = sum(experts[layer] for layer in one.layers)
        assert demand <= one.num_slots <= held
        assert left < one.slot_bytes or one.num_slots == held
        assert one.num_slots - one.staging_slots >= max(top_k[layer] for layer in one.layers)
        assert all(lengths[layer] == one.slot_bytes for layer in one.layers)
        assert (one.first, one.offset(one.first)) == (first, offset)
        first, offset = first + one.num_slots, offset + one.nbytes
    assert sorted(layer for one in plan.classes for layer in one.layers) == list(range(len(layers)))
    assert plan.token_bytes == sum(length * k for length, k in zip(lengths, top_k, strict=True))


@given(budget=st.integers(1, 400), experts=st.integers(8, 64))
def test_layers_of_one_length_share_their_slots(budget: int, experts: int) -> None:
    if budget < 14:
        with pytest.raises(BudgetError, match="one token needs 14"):
            plan_pool(budget * PAGE, [PAGE] * 3, [experts] * 3, [4, 2, 8])
        return
    (one,) = plan_pool(budget * PAGE, [PAGE] * 3, [experts] * 3, [4, 2, 8]).classes
    assert (one.slot_bytes, one.num_slots, one.layers) == (PAGE, min(budget, 3 * experts), (0, 1, 2))


def test_slots_lie_one_behind_the_other() -> None:
    classes = plan_pool(2 * 3 * PAGE + 4 * PAGE, [3 * PAGE, PAGE], [8, 8], [2, 4]).classes
    memory, slots = allocate_pool(classes)
    assert [len(slot) for slot in slots] == [3 * PAGE] * 2 + [PAGE] * 4
    for number, slot in enumerate(slots):
        slot[:] = bytes([number + 1]) * len(slot)
    whole = bytes(memory[: 10 * PAGE])
    assert whole == b"".join(bytes([number + 1]) * len(slot) for number, slot in enumerate(slots))
    slots.clear()
