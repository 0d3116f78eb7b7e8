"""A budget in words, and the advice when it is too small: the advice, passed back, works."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from foreroute.errors import BudgetError
from foreroute.memory.budget import SlotPlan, plan_pool
from foreroute.units import format_memory, kept_bytes, parse_memory

GIB = 2**30


def plan_slots(budget_bytes: int, slot_bytes: int, num_experts: int, top_k: list[int]) -> SlotPlan:
    """With slots of one length for all layers, and `num_experts` in all."""
    return plan_pool(budget_bytes, [slot_bytes] * len(top_k), [num_experts, *[0] * (len(top_k) - 1)], top_k)


@pytest.mark.parametrize(
    ("memory", "num_bytes"),
    [
        (12345, 12345),
        ("12345", 12345),
        ("8GiB", 8 * GIB),
        ("8gib", 8 * GIB),
        ("8GB", 8 * 10**9),
        ("1.5 GiB", 3 * GIB // 2),
        (" 512MiB ", GIB // 2),
        ("0.1GiB", GIB // 10),
        ("64 KiB", 65536),
        ("2TB", 2 * 10**12),
        ("8G", 8 * GIB),
        ("8 g", 8 * GIB),
        ("8000M", 8000 * 2**20),
        ("1.5T", 3 * 2**39),
        ("512k", 2**19),
        ("8 GiB", 8 * GIB),
        ("4096B", 4096),
        ("8B", 8),
        ("4096", 4096),
        ("25%", 250),
        ("12.5 %", 125),
        ("100%", 1000),
        ("0.3%", 3),
    ],
)
def test_memory_is_read(memory, num_bytes):
    assert parse_memory(memory, 1000) == num_bytes


@pytest.mark.parametrize(
    "memory",
    [
        "",
        "much",
        "GiB",
        "8 8GiB",
        "-1GiB",
        "8GiB!",
        "1e9",
        "8 X",
        "1,5GiB",
        "101%",
        "100.1%",
        "0",
        "0%",
        "0.0GiB",
        "٣GiB",
        0,
        -5,
        True,
        2.5,
        None,
    ],
)
def test_nonsense_is_refused_with_the_forms_that_are_read(memory):
    with pytest.raises(BudgetError, match=re.escape(repr(memory))) as refused:
        parse_memory(memory, 1000)
    for form in ("8589934592", '"8GiB"', '"1.5 GiB"', '"512MiB"', '"8GB"', '"25%"'):
        assert form in str(refused.value)


@pytest.mark.parametrize(
    ("memory", "meant"),
    [("8", "8GiB"), (8, "8GiB"), (" 1.5 ", "1.5GiB"), ("512", "512GiB"), ("2048", "2048MiB"), (4095, "4095MiB")],
)
def test_a_small_number_without_a_unit_is_not_taken_for_bytes(memory, meant):
    with pytest.raises(BudgetError, match=f"{memory!r} has no unit.* Did you mean {meant}\\?"):
        parse_memory(memory, 1000)


@given(num_bytes=st.integers(1, 2**50))
def test_memory_rounded_up_is_enough_and_not_much_more(num_bytes):
    printed = format_memory(num_bytes, round_up=True)
    assert num_bytes <= parse_memory(printed, 1)
    assert parse_memory(printed, 1) <= num_bytes * 1.1 + 1


def test_memory_is_printed_in_the_largest_unit():
    assert [format_memory(num_bytes) for num_bytes in (999, 1024, 1536 * 1024, int(1.2 * GIB), 3 * 2**40)] == [
        "999 B",
        "1.0 KiB",
        "1.5 MiB",
        "1.2 GiB",
        "3.0 TiB",
    ]


def test_too_small_a_budget_says_what_would_do():
    slot_bytes = 36 * 2**20
    with pytest.raises(BudgetError) as refused:
        plan_slots(parse_memory("1.2GiB", 1), slot_bytes, 512, [8] * 8)
    assert str(refused.value) == "1.2 GiB holds 34 slots; one token needs 64. Raise --memory to 2.3 GiB."
    assert plan_slots(parse_memory("2.3 GiB", 1), slot_bytes, 512, [8] * 8).num_slots >= 64


@given(
    slot_bytes=st.integers(1, 2**31),
    top_k=st.lists(st.integers(1, 16), min_size=1, max_size=60),
    budget_share=st.floats(0, 1.2),
    spare=st.integers(0, 4000),
)
def test_the_advice_works_when_passed_back(slot_bytes, top_k, budget_share, spare):
    num_experts = sum(top_k) + spare
    budget = int(budget_share * sum(top_k) * slot_bytes)
    assume(budget > 0)
    try:
        plan = plan_slots(budget, slot_bytes, num_experts, top_k)
    except BudgetError as error:
        told = re.search(r"Raise --memory to (.*)\.$", str(error))
        assert told is not None
        budget = parse_memory(told[1], num_experts * slot_bytes)
        plan = plan_slots(budget, slot_bytes, num_experts, top_k)
    assert plan.token_demand_slots == sum(top_k) <= plan.num_slots <= num_experts
    assert plan.pool_bytes <= budget
    assert plan.num_slots - plan.staging_slots >= max(top_k)
    assert (plan.staging_slots == 0) or plan.num_slots < num_experts
    assert plan.staging_slots <= 2 * max(top_k)
    if max(top_k) * 2 <= plan.num_slots < num_experts:
        assert plan.staging_slots >= max(top_k)


@pytest.mark.parametrize(
    ("num_slots", "staging_slots"),
    [
        (64, 8),  # an eighth
        (100, 12),
        (200, 16),  # not more than two layers' top-k
        (512, 0),  # everything is resident
        (5000, 0),
    ],
)
def test_staging_is_a_small_share(num_slots, staging_slots):
    plan = plan_slots(num_slots * 4096, 4096, 512, [8] * 8)
    assert plan.staging_slots == staging_slots
    assert plan.num_slots == min(num_slots, 512)


def test_staging_leaves_room_for_one_layer():
    assert plan_slots(10 * 4096, 4096, 64, [8]).staging_slots == 2
    assert plan_slots(8 * 4096, 4096, 64, [8]).staging_slots == 0


def test_one_slot_is_singular():
    with pytest.raises(BudgetError, match=r"^4\.0 KiB holds 1 slot; one token needs 2\. Raise --memory to 8\.0 KiB\.$"):
        plan_slots(4096, 4096, 8, [2])


def test_what_is_kept_is_no_share() -> None:
    assert [kept_bytes(asked) for asked in (None, 0, "0", "1KiB", 2**33)] == [None, 0, 0, 1024, 2**33]
    with pytest.raises(BudgetError, match=r"prefix_cache is '25%', a share\. Give an amount"):
        kept_bytes("25%")
