"""The pool, step by step: each test shows the whole picture."""

import pytest

from foreroute.residency import states as states_module
from foreroute.residency.eviction import Lfu, Lru
from foreroute.residency.slots import LookupResult, Residency
from foreroute.residency.states import (
    EVENT_NAMES,
    FREE,
    LOADING,
    PINNED,
    READY,
    STATE_NAMES,
    TABLE,
    IllegalEvent,
    NoVictim,
)


def make_pool(num_slots=4, staging_slots=2, num_keys=20, eviction=None):
    return Residency(num_slots, num_keys, eviction=eviction or Lru(), staging_slots=staging_slots, keys_per_layer=10)


def fill(pool, keys):
    """Load keys as a decode step does, and release them."""
    demand = pool.demand(keys)
    for key, _ in [*demand.misses, *demand.in_flight]:
        pool.loaded(key)
        pool.pin(key)
    pool.release(keys)


def stage(pool, keys):
    """Prefetch keys, and let them arrive."""
    loads = pool.prefetch(keys)
    for key, _ in loads:
        pool.loaded(key)
    return loads


def test_the_life_of_a_slot():
    pool = make_pool(num_slots=2)
    assert repr(pool) == "Residency(free, free; 0/2 prefetched)"
    assert pool.demand([3]) == LookupResult([], [], [(3, 0)])
    assert repr(pool) == "Residency(3 loading, free; 0/2 prefetched)"
    pool.loaded(3)
    assert repr(pool) == "Residency(3 ready, free; 0/2 prefetched)"
    pool.pin(3)
    assert repr(pool) == "Residency(3 pinned, free; 0/2 prefetched)"
    pool.release([3])
    assert pool.demand([3]) == LookupResult([(3, 0)], [], [])
    assert repr(pool) == "Residency(3 pinned, free; 0/2 prefetched)"


def test_the_table_in_the_docstring_is_the_table():
    lines = states_module.__doc__.splitlines()
    head = next(index for index, line in enumerate(lines) if line.split()[:2] == ["state", "LOAD"])
    assert [event.lower() for event in lines[head].split()[1:]] == list(EVENT_NAMES)
    for state, line in enumerate(lines[head + 1 : head + 1 + len(TABLE)]):
        name, *cells = line.lower().split()
        assert name == STATE_NAMES[state]
        assert cells == [STATE_NAMES[after] if after >= 0 else "." for after in TABLE[state]]


def test_a_miss_takes_a_free_slot_then_the_coldest_then_the_oldest_staged():
    pool = make_pool(num_slots=4, staging_slots=2)
    fill(pool, [1])
    stage(pool, [11, 12])
    assert repr(pool) == "Residency(1 ready, 11 prefetched ready, 12 prefetched ready, free; 2/2 prefetched)"
    assert pool.demand([5, 6, 7]).misses == [(5, 3), (6, 0), (7, 1)]
    assert repr(pool) == "Residency(6 loading, 7 loading, 12 prefetched ready, 5 loading; 1/2 prefetched)"
    assert (pool.evictions, pool.prefetch_wasted) == (2, 1)


def test_a_demand_never_evicts_its_own_hits():
    pool = make_pool(num_slots=3, staging_slots=0)
    fill(pool, [1])
    fill(pool, [2])
    fill(pool, [3])
    assert pool.demand([4, 1]) == LookupResult([(1, 0)], [], [(4, 1)])
    assert repr(pool) == "Residency(1 pinned, 4 loading, 3 ready; 0/0 prefetched)"


def test_too_large_a_demand_changes_nothing():
    pool = make_pool(num_slots=3, eviction=Lfu())
    fill(pool, [1, 2])
    pool.demand([2])
    before = repr(pool)
    with pytest.raises(NoVictim, match="3 slots are demanded"):
        pool.demand([3, 4, 5])
    assert repr(pool) == before
    assert pool.demand([3, 4]).misses == [(3, 2), (4, 0)]


def test_a_demand_beside_a_hit_does_not_count_the_hit_as_room():
    pool = make_pool(num_slots=2, staging_slots=0)
    fill(pool, [1, 2])
    with pytest.raises(NoVictim):
        pool.demand([1, 3, 4])
    assert pool.state(1) == READY


def test_a_pinned_key_cannot_be_demanded():
    pool = make_pool()
    pool.demand([1])
    pool.loaded(1)
    pool.pin(1)
    with pytest.raises(IllegalEvent, match="pin of key 1, which is pinned"):
        pool.demand([2, 1])
    assert repr(pool) == "Residency(1 pinned, free, free, free; 0/2 prefetched)"


def test_a_key_demanded_twice_at_once_is_refused():
    with pytest.raises(AssertionError, match="twice"):
        make_pool().demand([1, 1])


def test_a_late_hit_becomes_a_demand_and_leaves_staging():
    pool = make_pool(staging_slots=1)
    assert pool.prefetch([11, 12]) == [(11, 0)]
    assert pool.demand([11]) == LookupResult([], [(11, 0)], [])
    assert repr(pool) == "Residency(11 loading, free, free, free; 0/1 prefetched)"
    assert pool.prefetch_used == 1
    assert pool.prefetch([12]) == [(12, 1)]
    pool.loaded(11)
    pool.pin(11)
    assert pool.state(11) == PINNED


def test_a_guess_that_arrived_in_time_is_a_hit():
    pool = make_pool()
    stage(pool, [11])
    assert pool.demand([11]) == LookupResult([(11, 0)], [], [])
    assert (pool.prefetch_used, pool.prefetch_wasted, pool.num_prefetched) == (1, 0, 0)


def test_staging_is_bounded_even_while_slots_are_free():
    pool = make_pool(num_slots=4, staging_slots=2)
    assert pool.prefetch([11, 12, 13]) == [(11, 0), (12, 1)]
    assert pool.prefetch([13]) == []
    pool.loaded(11)
    assert pool.prefetch([13]) == [(13, 0)]
    assert repr(pool) == "Residency(13 prefetched loading, 12 prefetched loading, free, free; 2/2 prefetched)"
    assert (pool.prefetch_wasted, pool.evictions) == (1, 1)


def test_guesses_evict_each_other_oldest_first():
    pool = make_pool(num_slots=4, staging_slots=2)
    fill(pool, [1, 2])
    stage(pool, [11, 12])
    stage(pool, [13])
    assert repr(pool) == "Residency(1 ready, 2 ready, 13 prefetched ready, 12 prefetched ready; 2/2 prefetched)"


def test_what_is_guessed_again_is_young_again():
    pool = make_pool(num_slots=4, staging_slots=2)
    stage(pool, [11, 12])
    assert pool.prefetch([11, 13]) == [(13, 1)]
    assert pool.slot_of(11) == 0


def test_a_guess_never_evicts_what_the_same_guess_holds():
    pool = make_pool(num_slots=2, staging_slots=2)
    fill(pool, [1])
    fill(pool, [2])
    assert pool.prefetch([1, 11]) == [(11, 1)]
    assert pool.prefetch([12, 1, 11]) == []
    pool.loaded(11)
    assert pool.prefetch([12, 1, 11]) == []
    # Passed over, not forgotten: it is still the next to go.
    assert pool.demand([3]).misses == [(3, 0)]


def test_a_guess_never_evicts_what_is_in_use():
    pool = make_pool(num_slots=2, staging_slots=2)
    fill(pool, [1])
    pool.demand([1, 2])
    assert pool.prefetch([11]) == []
    assert repr(pool) == "Residency(1 pinned, 2 loading; 0/2 prefetched)"


def test_no_staging_no_prefetch():
    pool = make_pool(staging_slots=0)
    assert pool.prefetch([1, 2]) == []


def test_a_pinned_key_that_was_passed_over_can_be_evicted_after_its_release():
    pool = make_pool(num_slots=2, staging_slots=1)
    fill(pool, [1, 2])
    pool.demand([1])
    assert pool.prefetch([11]) == [(11, 1)]
    pool.loaded(11)
    assert pool.prefetch([12]) == [(12, 1)]
    pool.release([1])
    assert pool.demand([3]).misses == [(3, 0)]


def test_cancel_and_fail_free_the_slot():
    pool = make_pool(num_slots=2)
    pool.prefetch([11])
    pool.cancel(11)
    pool.demand([1])
    pool.fail(1)
    assert repr(pool) == "Residency(free, free; 0/2 prefetched)"
    assert (pool.state(1), pool.slot_of(1), pool.num_resident) == (FREE, -1, 0)
    assert pool.prefetch_wasted == 0
    assert pool.evictions == 0


def test_pinning_a_prefetched_key_is_its_demand():
    pool = make_pool(num_slots=2, staging_slots=1)
    stage(pool, [11])
    fill(pool, [1])
    pool.pin(11)
    assert repr(pool) == "Residency(11 pinned, 1 ready; 0/1 prefetched)"
    assert pool.prefetch_used == 1
    # It is the more recently used one, too.
    pool.release([11])
    assert pool.demand([2]).misses == [(2, 1)]


def test_what_is_dropped_goes_at_once_and_comes_back_as_any_other():
    pool = make_pool(num_slots=3, staging_slots=1)
    fill(pool, [1, 2])
    stage(pool, [11])
    pool.drop([11, 1])
    assert repr(pool) == "Residency(free, 2 ready, free; 0/1 prefetched)"
    assert (pool.evictions, pool.prefetch_wasted, pool.num_resident, pool.num_free) == (2, 1, 1, 2)
    # Its old place in the order of eviction is not that of the guess that brings it back.
    stage(pool, [1])
    assert repr(pool) == "Residency(1 prefetched ready, 2 ready, free; 1/1 prefetched)"
    assert pool.demand([3, 4]).misses == [(3, 2), (4, 1)]


def test_borrowed_slots_are_out_of_the_pool_until_they_are_given_back():
    pool = make_pool(num_slots=4, staging_slots=1)
    fill(pool, [1])
    fill(pool, [2])
    stage(pool, [11])
    assert pool.borrow(3) == [3, 2, 0]
    assert repr(pool) == "Residency(borrowed, 2 ready, borrowed, borrowed; 0/1 prefetched)"
    assert (pool.num_resident, pool.prefetch_wasted, pool.evictions) == (1, 1, 2)
    pool.demand([2])
    assert pool.borrow(1) == []
    pool.give_back([0])
    assert pool.demand([3]).misses == [(3, 0)]
    with pytest.raises(IllegalEvent, match="slot 0, which is not borrowed"):
        pool.give_back([0])


def test_residents_are_counted_per_layer():
    pool = make_pool(num_slots=3, staging_slots=1)
    fill(pool, [1, 2])
    pool.prefetch([11])
    assert pool.resident_per_layer == [2, 1]
    pool.cancel(11)
    pool.demand([12, 13])
    assert pool.resident_per_layer == [1, 2]
    assert pool.num_resident == 3


def test_frequent_outlives_recent_under_lfu_alone():
    survivors = {}
    for name, eviction in (("lru", Lru()), ("lfu", Lfu())):
        pool = make_pool(num_slots=2, staging_slots=0, eviction=eviction)
        for keys in ([1], [1], [2]):
            fill(pool, keys)
            pool.tick()
        fill(pool, [3])
        survivors[name] = 1 if pool.contains_ready(1) else 2
    assert survivors == {"lru": 2, "lfu": 1}


def test_a_large_pool_is_summed_up():
    pool = make_pool(num_slots=100, staging_slots=4, num_keys=200)
    fill(pool, [1, 2])
    pool.prefetch([11])
    pool.borrow(5)
    assert repr(pool) == "Residency(92 free, 1 loading, 2 ready, 5 borrowed; 1/4 prefetched)"


def deferring_pool(num_slots=12, staging_slots=4, deferred_slots=2):
    return Residency(num_slots, 40, eviction=Lru(), staging_slots=staging_slots, deferred_slots=deferred_slots)


def test_deferred_loads_and_prefetches_leave_slots_for_a_demand():
    pool = deferring_pool()
    for key, _ in pool.prefetch([1, 2, 3, 4]):
        pool.loaded(key)
    assert [key for key, _ in pool.defer([11, 12, 13, 14])] == [11, 12]
    assert [key for key, _ in pool.prefetch([5, 6, 7, 8])] == [5, 6, 7, 8]
    # Four prefetches and two deferred loads are in flight: the other six slots are available.
    assert len(pool.demand([31, 32, 33, 34, 35, 36]).misses) == 6
    assert pool.deferred == {11, 12}


def test_a_deferred_load_enters_as_a_demanded_key_does():
    pool = deferring_pool(num_slots=3, staging_slots=1)
    fill(pool, [1])
    fill(pool, [2])
    fill(pool, [3])
    assert [key for key, _ in pool.defer([9])] == [9]
    assert pool.state(1) == FREE, "the coldest was evicted"
    pool.loaded(9)
    assert pool.deferred == set()
    assert [key for key, _ in pool.demand([9]).hits] == [9]
    assert pool.prefetch_used == pool.prefetch_wasted == 0


def test_a_prefetch_in_flight_whose_expert_is_substituted_becomes_deferred():
    pool = deferring_pool()
    pool.prefetch([5])
    assert pool.defer([5]) == []
    assert (pool.num_prefetched, pool.prefetch_used) == (0, 1)
    pool.loaded(5)
    assert [key for key, _ in pool.demand([5]).hits] == [5]


def test_prefetches_whose_experts_are_substituted_never_fill_the_pool():
    """Round after round the reads in flight are not waited for; a demand finds a slot all the same."""
    pool = deferring_pool()
    for first in (0, 4, 8, 12):
        guessed = list(range(first, first + 4))
        pool.prefetch(guessed)
        pool.defer([key for key in guessed if pool.state(key) == LOADING])
        assert sum(pool.state(key) == LOADING for key in range(40)) <= 4 + 2
    assert len(pool.demand([31, 32, 33, 34, 35, 36]).misses) == 6


def test_a_deferred_load_that_is_demanded_in_flight_is_a_late_hit():
    pool = deferring_pool()
    ((key, slot),) = pool.defer([9])
    assert pool.demand([9]).in_flight == [(9, slot)]
    pool.cancel(key)
    assert pool.deferred == set()
