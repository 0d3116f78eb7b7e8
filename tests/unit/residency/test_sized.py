"""Slots of several lengths: each length is a pool of its own, and asked together they are their sum."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from foreroute.residency import IllegalEvent, Lfu, Lru, NoVictim, Residency, SizedResidency
from foreroute.residency.sized import by_layer, parts_of, residency_of
from foreroute.residency.states import FREE, LOADING, PINNED, READY
from foreroute.types import SlotClass

LAYERS, WIDTH = 4, 4
PART_OF_LAYER = (0, 1, 1, 0)
some_keys = st.lists(st.integers(0, LAYERS * WIDTH - 1), unique=True, max_size=6)
some_experts = st.lists(st.integers(0, WIDTH - 1), unique=True, max_size=4)
any_layer = st.integers(0, LAYERS - 1)


def part_of(key: int) -> int:
    return PART_OF_LAYER[key // WIDTH]


class SizedMachine(RuleBasedStateMachine):
    """Beside the pool, a `Residency` for each length by itself, that knows no other: both do the same."""

    @initialize(
        counts=st.tuples(st.integers(2, 6), st.integers(2, 6)), staging=st.integers(0, 2), deferred=st.integers(0, 2),
        eviction=st.sampled_from([Lru, Lfu]),
    )  # fmt: skip
    def start(self, counts: tuple[int, int], staging: int, deferred: int, eviction: Any) -> None:
        classes = [
            SlotClass(8192, counts[0], (0, 3), staging, 0, 0),
            SlotClass(4096, counts[1], (1, 2), staging, counts[0], counts[0] * 4096),
        ]
        self.firsts = (0, counts[0])
        made = residency_of(
            classes, LAYERS * WIDTH, WIDTH, eviction, prefetches=True, deferred_slots=[deferred, deferred]
        )
        assert isinstance(made, SizedResidency)
        self.pool = made
        self.alone = [
            Residency(
                count, LAYERS * WIDTH, eviction=eviction(), staging_slots=staging, deferred_slots=deferred,
                keys_per_layer=WIDTH,
            )
            for count in counts
        ]  # fmt: skip

    def same_loads(self, loads: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
        assert loads == [(key, slot + self.firsts[part_of(key)]) for key, slot in expected]

    def keys_in(self, keys: list[int], *states: int) -> list[int]:
        return [key for key in keys if self.pool.state(key) in states]

    @rule(layer=any_layer, experts=some_experts)
    def demand(self, layer: int, experts: list[int]) -> None:
        keys = [layer * WIDTH + expert for expert in experts]
        alone = self.alone[PART_OF_LAYER[layer]]
        try:
            expected = alone.demand(keys)
        except (NoVictim, IllegalEvent) as failure:
            with pytest.raises(type(failure)):
                self.pool.by_layer[layer].demand(keys)
            return
        found = self.pool.by_layer[layer].demand(keys)
        for ours, theirs in zip(found, expected, strict=True):
            self.same_loads(ours, theirs)

    @rule(layer=any_layer, experts=some_experts)
    def prefetch(self, layer: int, experts: list[int]) -> None:
        keys = [layer * WIDTH + expert for expert in experts]
        expected = self.alone[PART_OF_LAYER[layer]].prefetch(keys)
        self.same_loads(self.pool.by_layer[layer].prefetch(keys), expected)

    @rule(keys=some_keys)
    def defer(self, keys: list[int]) -> None:
        keys = self.keys_in(keys, FREE, LOADING)
        loads = self.pool.defer(keys)
        for part, alone in enumerate(self.alone):
            own = [key for key in keys if part_of(key) == part]
            if own:
                self.same_loads([load for load in loads if part_of(load[0]) == part], alone.defer(own))

    @rule(
        keys=some_keys,
        event=st.sampled_from([("loaded", LOADING), ("pin", READY), ("cancel", LOADING), ("fail", LOADING)]),
    )
    def event(self, keys: list[int], event: tuple[str, int]) -> None:
        name, state = event
        for key in self.keys_in(keys, state):
            getattr(self.pool, name)(key)
            getattr(self.alone[part_of(key)], name)(key)

    @rule(keys=some_keys, event=st.sampled_from([("release", PINNED), ("drop", READY)]))
    def events(self, keys: list[int], event: tuple[str, int]) -> None:
        name, state = event
        keys = self.keys_in(keys, state)
        getattr(self.pool, name)(keys)
        for part, alone in enumerate(self.alone):
            getattr(alone, name)([key for key in keys if part_of(key) == part])

    @rule()
    def tick(self) -> None:
        for one in (self.pool, *self.alone):
            one.tick()

    @rule(layer=any_layer, num_slots=st.integers(0, 7))
    def stream_through(self, layer: int, num_slots: int) -> None:
        first = self.firsts[PART_OF_LAYER[layer]]
        slots = self.pool.by_layer[layer].borrow(num_slots)
        alone = self.alone[PART_OF_LAYER[layer]]
        assert slots == [slot + first for slot in alone.borrow(num_slots)]
        self.pool.give_back(slots)
        alone.give_back([slot - first for slot in slots])

    @rule(how=st.integers(0, 19))
    def clear(self, how: int) -> None:
        if not how:
            for one in (self.pool, *self.alone):
                one.clear()

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def same(self) -> None:
        pool, alone = self.pool, self.alone
        held = []
        for key in range(LAYERS * WIDTH):
            own = alone[part_of(key)]
            assert pool.state(key) == own.state(key)
            assert pool.contains_ready(key) == own.contains_ready(key)
            slot = pool.slot_of(key)
            assert slot == (own.slot_of(key) + self.firsts[part_of(key)] if own.slot_of(key) >= 0 else -1)
            assert slot < 0 or slot in pool.parts[part_of(key)].slots
            held += [slot] if slot >= 0 else []
        assert len(held) == len(set(held)) == pool.num_resident
        for name in ("num_slots", "staging_slots", "num_free", "num_resident", "num_prefetched", "evictions",
                     "prefetch_used", "prefetch_wasted"):  # fmt: skip
            assert getattr(pool, name) == sum(getattr(one, name) for one in alone), name
        assert sorted(pool.prefetched_ready) == sorted(key for one in alone for key in one.prefetched_ready)
        assert pool.deferred == {key for one in alone for key in one.deferred}
        assert pool.ready_keys() == sorted(key for one in alone for key in one.ready_keys())
        for layer, part in enumerate(pool.by_layer):
            assert part.resident_per_layer[layer] == alone[PART_OF_LAYER[layer]].resident_per_layer[layer]


TestSized = SizedMachine.TestCase
TestSized.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_one_length_is_a_plain_pool() -> None:
    made = residency_of([SlotClass(4096, 3, (0, 1), 2)], 8, 4, Lru, prefetches=False, deferred_slots=[1])
    assert isinstance(made, Residency)
    assert (made.num_slots, made.staging_slots, made.deferred_slots, made.num_keys) == (3, 0, 1, 8)
    assert by_layer(made, 2) == [made, made]
    assert parts_of(made) == (made,)


def test_a_slot_that_is_not_lent_is_not_taken_back() -> None:
    made = residency_of(
        [SlotClass(8192, 2, (0,), 0), SlotClass(4096, 2, (1,), 0, 2, 8192)], 8, 4, Lru, prefetches=False,
        deferred_slots=[0, 0],
    )  # fmt: skip
    with pytest.raises(IllegalEvent, match="slot 3"):
        made.give_back([3])
    assert repr(made) == "SizedResidency(Residency(free, free; 0/0 prefetched); Residency(free, free; 0/0 prefetched))"
