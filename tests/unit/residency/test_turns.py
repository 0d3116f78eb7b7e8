"""Turns gives up what a plain `min` over its definition would, and its heaps stay small."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreroute.residency.eviction import Lfu, Turns
from foreroute.residency.slots import Residency

NUM_KEYS, WIDTH = 10, 4  # three layers, the last one narrower
one_layer = st.integers(0, 2).flatmap(
    lambda layer: st.lists(st.integers(layer * WIDTH, min(layer * WIDTH + WIDTH, NUM_KEYS) - 1), unique=True)
)
any_keys = st.lists(st.integers(0, NUM_KEYS - 1), unique=True, max_size=4)
events = st.lists(
    st.one_of(
        st.tuples(st.just("touch"), one_layer | any_keys),
        st.tuples(st.just("add"), any_keys),
        st.tuples(st.sampled_from(["pop", "tick", "tick"]), st.just([])),
    ),
    max_size=120,
)


class NaiveTurns:
    """The definition, with a dictionary for everything."""

    def __init__(self, decay, fresh):
        self.decay, self.fresh, self.use = decay, fresh, 2.0**32
        self.score = dict.fromkeys(range(NUM_KEYS), 0)
        self.bonus = dict.fromkeys(range(NUM_KEYS), 0)
        self.passed = set()

    def touch(self, keys):
        for layer in {key // WIDTH for key in keys} - self.passed:
            self.passed.add(layer)
            for key in self.bonus:
                if key // WIDTH == layer:
                    self.bonus[key] = 0
        for key in keys:
            self.score[key] += int(self.use)
            self.bonus[key] = self.bonus[key] or self.fresh * int(self.use)

    def tick(self):
        self.use /= self.decay
        self.passed.clear()

    def worth(self, key):
        entry = ((self.score[key] + self.bonus[key]) << (NUM_KEYS - 1).bit_length()) | key
        layer = key // WIDTH
        ahead = 0.6 ** (layer / 3)
        # As floats between layers, exactly within one.
        return entry * (0.6 * self.decay * ahead if layer in self.passed else ahead), layer, entry


@given(events=events, decay=st.sampled_from([1.0, 0.95, 0.5]), fresh=st.sampled_from([0, 1, 4]))
def test_victims_are_those_of_min(events, decay, fresh):
    eviction = Turns(WIDTH, decay, fresh)
    eviction.reset(NUM_KEYS)
    naive, candidates = NaiveTurns(decay, fresh), set()
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
            victim = min(candidates, key=naive.worth, default=-1)
            assert eviction.pop() == victim
            candidates.discard(victim)
    for victim in sorted(candidates, key=naive.worth):
        assert eviction.pop() == victim
    assert eviction.pop() == -1


def order_of(eviction):
    eviction.add(range(NUM_KEYS))
    return [eviction.pop() for _ in range(NUM_KEYS)]


def test_a_layer_that_is_passed_is_evicted_before_one_that_is_to_come():
    eviction = Turns(WIDTH)
    eviction.reset(NUM_KEYS)
    eviction.touch([1])
    eviction.touch([5])
    eviction.tick()
    eviction.touch([0])
    # Layer 0 is passed: 1 has lost its turn, and 0 had it. 5 is still to come.
    assert [key for key in order_of(eviction) if key in (0, 1, 5)] == [1, 0, 5]
    eviction.touch([4])
    # Now layer 1 is the one that was just passed.
    assert [key for key in order_of(eviction) if key in (0, 1, 4, 5)] == [5, 1, 4, 0]


def test_the_last_turn_counts_for_more_until_the_next():
    eviction = Turns(WIDTH, decay=1.0, fresh=2)
    eviction.reset(NUM_KEYS)
    for keys in ([0], [0], [1]):
        eviction.touch(keys)
        eviction.tick()
    assert order_of(eviction)[-2:] == [0, 1]
    eviction.touch([2])
    # Two uses against one, now that neither is of the last turn.
    assert order_of(eviction)[-3:] == [1, 0, 2]


def test_a_second_touch_in_a_step_is_a_use_but_no_turn():
    eviction = Turns(WIDTH, decay=1.0, fresh=2)
    eviction.reset(NUM_KEYS)
    eviction.touch([0])
    eviction.touch([1])
    eviction.touch([1])
    # 0 is fresh still.
    assert order_of(eviction)[-2:] == [0, 1]
    eviction.tick()
    eviction.touch([2])
    eviction.touch([0])
    assert order_of(eviction)[-3:] == [1, 2, 0]


def test_thousands_of_steps_keep_their_order_and_their_heaps_small():
    eviction = Turns(WIDTH)
    eviction.reset(NUM_KEYS)
    for step in range(6000):
        eviction.tick()
        for layer in range(2):
            base = layer * WIDTH
            eviction.touch([base] if step % 2 else [base, base + 1])
            eviction.add([base, base + 1, base + 2])
        if step % 100 == 99:
            victims = [eviction.pop() for _ in range(6)]
            # The coldest of each layer; then the layers are alike, and the one that was just passed goes first.
            assert victims == [2, 6, 5, 1, 4, 0]
            eviction.add(victims)
        assert max(map(len, eviction._heaps)) <= 4 * WIDTH + 4
    assert max(entry.bit_length() for entry in eviction._entries) < 120


def test_it_misses_less_than_lfu_where_the_last_token_tells_most():
    """A pool of one token's demand, two layers that change one of their two experts each time."""

    def misses_of(eviction):
        pool = Residency(4, 12, eviction=eviction, staging_slots=0, keys_per_layer=6)
        misses = 0
        for step in range(60):
            pool.tick()
            for base in (0, 6):
                demand = pool.demand([base + step % 6, base + (step + 1) % 6])
                misses += len(demand.misses)
                for key, _ in demand.misses:
                    pool.loaded(key)
                    pool.pin(key)
                pool.release([base + step % 6, base + (step + 1) % 6])
        return misses

    # Each new expert once per layer and step, and the two of the beginning.
    assert misses_of(Turns(6)) == 2 * 60 + 2
    assert misses_of(Lfu()) > 1.3 * misses_of(Turns(6))


def test_what_makes_no_sense_is_refused():
    for arguments in ((0,), (4, 0.4), (4, 1.1)):
        with pytest.raises(AssertionError):
            Turns(*arguments)
