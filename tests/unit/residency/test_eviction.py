"""Both evictions give up what a plain `min` would."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreroute.residency.eviction import Lfu, Lru
from tests.unit.residency.naive import NaiveScores

NUM_KEYS = 12
keys = st.lists(st.integers(0, NUM_KEYS - 1), unique=True, max_size=4)
events = st.lists(
    st.one_of(
        st.tuples(st.just("touch"), keys),
        st.tuples(st.just("add"), keys),
        st.tuples(st.sampled_from(["pop", "tick"]), st.just([])),
    ),
    max_size=80,
)


@given(events=events, decay=st.sampled_from([None, 1.0, 0.97, 0.5]))
def test_victims_are_those_of_min(events, decay):
    eviction = Lru() if decay is None else Lfu(decay)
    eviction.reset(NUM_KEYS)
    naive, candidates = NaiveScores(NUM_KEYS, decay), set()
    for name, keys in events:
        if name == "touch":
            eviction.touch(keys)
            naive.touch(keys)
        elif name == "add":
            eviction.add(keys)
            candidates |= set(keys)
        elif name == "tick":
            eviction.tick()
            naive.tick()
        else:
            victim = naive.coldest(candidates)
            assert eviction.pop() == (-1 if victim is None else victim)
            candidates.discard(victim)
    for victim in sorted(candidates, key=lambda key: (naive.score[key], key)):
        assert eviction.pop() == victim
    assert eviction.pop() == -1


def test_lfu_weighs_uses_by_decay():
    eviction = Lfu(0.5)
    eviction.reset(3)
    eviction.touch([0])
    eviction.tick()
    eviction.touch([1])
    eviction.tick()
    eviction.touch([0])
    # 0.25 + 1 uses against 0.5
    assert eviction.score(0) / eviction.score(1) == 2.5
    assert eviction.score(2) == 0


def test_lfu_goes_on_past_the_largest_use():
    """Thousands of steps: a key that is used every step stays above one used at every other, above a forgotten one."""
    eviction = Lfu(0.97)
    eviction.reset(4)
    eviction.touch([3])
    for step in range(5000):
        eviction.touch([0] if step % 2 else [0, 1])
        eviction.tick()
        if step % 50 == 49:
            eviction.add([0, 1, 3])
            assert eviction.pop() == 3
            assert eviction.pop() == 1
            assert eviction.pop() == 0
    assert eviction.score(0) / eviction.score(1) == pytest.approx(2, rel=0.05)
    assert math.log2(eviction.score(0)) < 110
    assert eviction.score(3) == 0


def test_scaling_back_keeps_the_order_of_candidates():
    eviction = Lfu(0.5)
    eviction.reset(8)
    eviction.add(range(8))
    for uses, key in enumerate(reversed(range(8)), start=1):
        for _ in range(uses):
            eviction.touch([key])
    before = eviction.score(0)
    for _ in range(70):
        eviction.tick()
    assert eviction.score(0) < before
    # What is below a unit now is equal, and goes by its key.
    eviction.touch([2])
    eviction.touch([1, 0])
    eviction.touch([1])
    assert [eviction.pop() for _ in range(8)] == [3, 4, 5, 6, 7, 0, 2, 1]


def test_scaling_back_reorders_a_heap_of_stale_entries():
    eviction = Lfu(0.97)
    eviction.reset(8)
    for _ in range(1400):
        eviction.tick()
    eviction.add(range(8))
    for uses, key in enumerate(reversed(range(8)), start=1):
        for _ in range(uses):
            eviction.touch([key])
    before = eviction.score(0)
    for _ in range(100):
        eviction.tick()
    assert 0 < eviction.score(0) < before
    assert [eviction.pop() for _ in range(8)] == [7, 6, 5, 4, 3, 2, 1, 0]


def test_scaling_back_scales_old_and_new_uses_alike():
    eviction = Lfu(0.5)
    eviction.reset(200)
    for step in range(200):
        eviction.touch([step])
        eviction.tick()
        if step:
            assert eviction.score(step) == 2 * eviction.score(step - 1)


def test_an_absent_key_remembers_its_score():
    eviction = Lfu()
    eviction.reset(3)
    for _ in range(3):
        eviction.touch([2])
    eviction.touch([0, 1])
    eviction.add([2, 1, 0])
    assert [eviction.pop(), eviction.pop(), eviction.pop()] == [0, 1, 2]


def test_reset_forgets():
    for eviction in (Lru(), Lfu()):
        eviction.reset(2)
        eviction.touch([0])
        eviction.add([0, 1])
        eviction.reset(2)
        assert eviction.pop() == -1
        eviction.add([1, 0])
        assert eviction.pop() == 0


def test_a_decay_that_forgets_at_once_is_refused():
    with pytest.raises(AssertionError, match="decay"):
        Lfu(0.1)
