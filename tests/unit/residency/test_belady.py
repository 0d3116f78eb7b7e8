"""Belady's replay against every schedule there is, on cases small enough to try them all."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreroute.errors import BudgetError
from foreroute.residency.belady import belady_misses

NUM_KEYS = 5
NUM_SLOTS = 3
steps = st.lists(st.lists(st.integers(0, NUM_KEYS - 1), min_size=1, max_size=NUM_SLOTS), max_size=7)


def fewest_loads(demands: list[list[int]], num_slots: int, resident: frozenset[int]) -> int:
    """Loads of the best of all schedules, found by trying every content of the pool after every step."""
    costs = {resident: 0}
    for keys in demands:
        after: dict[frozenset[int], int] = {}
        for content, cost in costs.items():
            loads = cost + len(set(keys) - content)
            there = content | set(keys)
            kept = [key for key in there if key not in keys]
            for count in range(min(len(kept), num_slots - len(set(keys))) + 1):
                for others in combinations(kept, count):
                    state = frozenset(others) | set(keys)
                    after[state] = min(after.get(state, loads), loads)
        costs = after
    return min(costs.values())


@given(demands=steps, resident=st.sets(st.integers(0, NUM_KEYS - 1), max_size=NUM_SLOTS))
def test_no_schedule_loads_less(demands, resident):
    missed = belady_misses(demands, NUM_SLOTS, resident)
    assert sum(map(len, missed)) == fewest_loads(demands, NUM_SLOTS, frozenset(resident))


@given(demands=steps)
def test_with_the_best_first_content_the_slots_filled_are_free(demands):
    loads = sum(map(len, belady_misses(demands, NUM_SLOTS)))
    contents = [frozenset(some) for some in combinations(range(NUM_KEYS), NUM_SLOTS)]
    assert max(0, loads - NUM_SLOTS) == min(fewest_loads(demands, NUM_SLOTS, content) for content in contents)


def test_misses_are_named_by_step_and_the_farthest_goes():
    # With two slots, 2 replaces 1 (wanted last), not 0 (wanted next).
    assert belady_misses([[0], [1], [2], [0], [2], [1]], 2) == [[0], [1], [2], [], [], [1]]


def test_keys_of_the_step_are_not_evicted_by_their_neighbours():
    # 1 is never wanted again, yet it stays while the step that wants it is computed.
    assert belady_misses([[0, 1], [0, 2], [0]], 2) == [[0, 1], [2], []]
    assert belady_misses([[5, 5, 5]], 1) == [[5]]


def test_a_step_that_the_pool_does_not_hold_is_refused():
    with pytest.raises(BudgetError, match="demands 3 experts at once, and 2 slots"):
        belady_misses([[0], [1, 2, 3]], 2)


def test_long_routes_take_no_quadratic_time():
    # 200,000 demands; a scan of the pool per eviction would take minutes, and the suite's time limit with it.
    route = [[(step * 7919 + part * 104_729) % 5000 for part in range(8)] for step in range(25_000)]
    assert sum(map(len, belady_misses(route, 2500))) >= 5000
