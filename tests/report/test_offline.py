"""Replays count what a plain simulation counts, and Belady's count is the least that any choice can have."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreroute.errors import BudgetError
from foreroute.report.offline import RandomEviction, replay_belady, replay_eviction, replay_static, replays
from foreroute.report.route import RecordedRoute, pool_of, smallest_pool
from foreroute.residency.eviction import Lfu, Lru

NUM_LAYERS, NUM_EXPERTS = 2, 3
layers = st.tuples(
    *(
        st.lists(st.integers(layer * NUM_EXPERTS, (layer + 1) * NUM_EXPERTS - 1), max_size=2, unique=True).map(
            lambda keys: tuple(sorted(keys))
        )
        for layer in range(NUM_LAYERS)
    )
)
routes = st.lists(layers, min_size=1, max_size=6)


def route_of(steps, warm_up: int = 0, top_k=(2, 2), expert_bytes=(10, 10)) -> RecordedRoute:
    return RecordedRoute((NUM_EXPERTS,) * NUM_LAYERS, top_k, expert_bytes, 16, tuple(steps), (1,) * len(steps), warm_up)


def fewest_misses(route: RecordedRoute, num_slots: int) -> int:
    """By trying every choice of what to keep."""
    groups = [keys for step in route.steps[route.warm_up :] for keys in step]
    keys = range(route.num_keys)
    start = [frozenset(some) for some in combinations(keys, num_slots)] if route.warm_up else [frozenset()]
    misses = dict.fromkeys(start, 0)
    for group in groups:
        after: dict[frozenset[int], int] = {}
        for held, count in misses.items():
            count += len(set(group) - held)
            others = held - set(group)
            room = min(num_slots - len(group), len(others))
            for kept in combinations(sorted(others), room):
                now = frozenset(kept).union(group)
                after[now] = min(count, after.get(now, count))
        misses = after
    return min(misses.values())


@settings(deadline=None)
@given(steps=routes, num_slots=st.integers(2, 5), warm_up=st.integers(0, 2))
def test_belady_misses_as_few_as_can_be(steps, num_slots, warm_up) -> None:
    route = route_of(steps, min(warm_up, len(steps) - 1))
    assert replay_belady(route, num_slots).misses == fewest_misses(route, num_slots)


@settings(deadline=None)
@given(steps=st.lists(layers, min_size=4, max_size=30), num_slots=st.integers(4, 6), warm_up=st.integers(0, 3))
def test_nothing_misses_less_than_belady_and_all_count_the_same_demand(steps, num_slots, warm_up) -> None:
    route = route_of(steps, warm_up)
    outcomes = {name: replay(route, num_slots) for name, replay in replays(seed=1).items()}
    demand = sum(len(keys) for step in steps[warm_up:] for keys in step)
    for outcome in outcomes.values():
        assert outcome.hits + outcome.misses == demand
        assert outcome.misses >= outcomes["belady"].misses
        assert outcome.miss_bytes == 10 * outcome.misses
        assert outcome.tokens == len(steps) - warm_up


def naive_misses(route: RecordedRoute, num_slots: int, worth) -> int:
    """worth(key, uses): what a key is worth whose uses were these steps' and groups' numbers; the least worth goes."""
    held: set[int] = set()
    uses: dict[int, list[tuple[int, int]]] = {}
    misses = at = 0
    for number, step in enumerate(route.steps):
        for keys in step:
            at += 1
            absent = [key for key in keys if key not in held]
            misses += len(absent) * (number >= route.warm_up)
            for key in keys:
                uses.setdefault(key, []).append((number, at))
            others = sorted(held - set(keys), key=lambda key: (worth(uses[key]), key))
            held -= set(others[: max(len(held) + len(absent) - num_slots, 0)])
            held.update(keys)
    return misses


@settings(deadline=None)
@given(steps=st.lists(layers, min_size=2, max_size=40), num_slots=st.integers(4, 5))
def test_lru_and_lfu_are_what_they_say(steps, num_slots) -> None:
    route = route_of(steps, 1)
    assert replay_eviction(route, num_slots, Lru()).misses == naive_misses(route, num_slots, lambda uses: uses[-1][1])
    # A decay of a half in powers of two, as the engine has it: exact.
    halving = replay_eviction(route, num_slots, Lfu(0.5)).misses
    assert halving == naive_misses(route, num_slots, lambda uses: sum(2**number for number, _ in uses))


def test_static_keeps_the_most_used_and_leaves_room_for_the_others() -> None:
    # Uses in the counted steps: 0 three times, 3 three times, 1, 2, 4 and 5 once or twice.
    steps = [((1, 2), (4, 5)), ((0, 1), (3, 4)), ((0, 2), (3, 5)), ((0, 1), (3, 4))]
    outcome = replay_static(route_of(steps, warm_up=1), num_slots=4)
    # 4 slots less 2 for a layer's demand: 0 and 3 are pinned.
    assert (outcome.hits, outcome.misses) == (6, 6)
    assert replay_static(route_of(steps, warm_up=1), num_slots=6).misses == 0
    # Without a warm-up even what is pinned is loaded once.
    assert replay_static(route_of(steps[1:]), num_slots=4).misses == 8


def test_bytes_are_those_of_the_layers_that_missed() -> None:
    route = route_of([((0,), (3, 4))], expert_bytes=(10, 1000))
    for replay in replays(seed=0).values():
        assert replay(route, 4).miss_bytes == 2010


def test_random_is_any_candidate_and_the_same_for_a_seed() -> None:
    def order(seed: int) -> list[int]:
        eviction = RandomEviction(seed)
        eviction.reset(50)
        eviction.add(range(50))
        eviction.add([3])  # is one already
        return [eviction.pop() for _ in range(51)]

    assert sorted(order(1)[:50]) == list(range(50))
    assert order(1)[50] == -1
    assert order(1) == order(1) != order(2)


def test_budgets_below_the_demand_are_refused_with_what_would_do() -> None:
    route = route_of([((0, 1), (3, 4))] * 3)
    assert smallest_pool(route) == 4
    assert pool_of(route, "67%").num_slots == 4
    assert pool_of(route, "64B").num_slots == 4
    with pytest.raises(BudgetError, match=r"48 B holds 3 slots; one token needs 4. Raise --memory to 64 B"):
        pool_of(route, "50%")
    # Several rows demand more at once than a token does.
    wide = route_of([((0, 1, 2), ())], top_k=(1, 1))
    with pytest.raises(BudgetError, match=r"2 slots; one layer of a step of 1 rows needs 3. Raise --memory to 48 B"):
        pool_of(wide, "34%")
