"""The paging kernels equal residency/ and the reference; run by test_interpreted.py.

WALK_STEPS=10000 walks as far as the reference does in test_paging.py; here a step costs about 18 ms.
"""

import os

import pytest
import torch

from foreroute.device import paging, triton_paging, triton_planners
from foreroute.device.paging import CopyList, PagingState
from tests.support.paging import Walk, assert_fetched, same_decisions

NUM_STEPS = int(os.environ.get("WALK_STEPS", "1000"))


def test_the_planner_decides_as_residency_does() -> None:
    seen = dict.fromkeys(paging.COUNTERS, 0)
    for seed in range(max(NUM_STEPS // 50, 1)):
        walk = Walk(triton_paging, seed)
        walk.run(50)
        for name, count in walk.state.counts().items():
            seen[name] += count
    # A short walk that was asked for may not meet everything.
    assert NUM_STEPS < 1000 or all(seen[name] > 0 for name in paging.COUNTERS if name != "shortages"), seen


def test_the_planner_leaves_the_tensors_that_its_reference_leaves() -> None:
    same_decisions(triton_paging, num_steps=60)


@pytest.mark.parametrize("num_programs", [1, 5])
def test_records_come_whole(num_programs: int) -> None:
    assert_fetched(triton_paging, num_programs)


def test_a_demand_without_a_slot_is_counted() -> None:
    state = PagingState.create(3, 16, 8, staging_slots=0)
    ids, slots, copies = torch.tensor([[0, 1, 2, 5]]), torch.empty(1, 4, dtype=torch.int32), CopyList.create(4)
    triton_paging.plan(state, 1, ids, slots, copies, arrived=True)
    assert state.counts()["shortages"] == 1
    assert slots.tolist() == [[0, 1, 2, -1]]


def test_numbers_mean_the_same_in_both_files() -> None:
    for at, name in enumerate(
        ("HITS", "LATE_HITS", "MISSES", "PREFETCHED", "USED", "WASTED", "EVICTIONS", "SHORTAGES")
    ):
        assert getattr(triton_planners, f"_{name}").value == getattr(paging, name) == at
    assert [triton_planners._CLOCK.value, triton_planners._SEQUENCE.value, triton_planners._PINNED.value] == [
        paging.CLOCK, paging.SEQUENCE, paging.PINNED,
    ]  # fmt: skip
    assert (triton_planners._LOADED.value, triton_planners._IN_FLIGHT.value) == (paging.LOADED, paging.IN_FLIGHT)
