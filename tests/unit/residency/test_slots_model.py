"""Random sequences of events, legal and not: the pool does what the naive one does, slot by slot."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from foreroute.residency.eviction import Lfu, Lru
from foreroute.residency.slots import Residency
from foreroute.residency.states import FREE, LOADING, PINNED, READY, IllegalEvent, NoVictim
from tests.unit.residency.naive import NaivePool

NUM_KEYS, KEYS_PER_LAYER = 14, 5
some_keys = st.lists(st.integers(0, NUM_KEYS - 1), unique=True, max_size=6)
any_index = st.integers(0, 10**6)


class PoolMachine(RuleBasedStateMachine):
    @initialize(
        num_slots=st.integers(1, 9), staging=st.integers(0, 5), deferred=st.integers(0, 3),
        decay=st.sampled_from([None, 0.97, 0.5, 1.0]),
    )  # fmt: skip
    def start(self, num_slots, staging, deferred, decay):
        staging = min(staging, num_slots)
        self.pool = Residency(
            num_slots,
            NUM_KEYS,
            eviction=Lru() if decay is None else Lfu(decay),
            staging_slots=staging,
            deferred_slots=deferred,
            keys_per_layer=KEYS_PER_LAYER,
        )
        self.naive = NaivePool(num_slots, NUM_KEYS, staging, deferred, decay)

    def pick(self, index, *states):
        keys = self.naive.in_state(*states)
        return keys[index % len(keys)] if keys else None

    @rule(keys=some_keys)
    def demand(self, keys):
        before = repr(self.pool)
        pinned = [key for key in keys if self.naive.state[key] == PINNED]
        if pinned or not self.naive.can_demand(keys):
            with pytest.raises(IllegalEvent if pinned else NoVictim):
                self.pool.demand(keys)
            assert repr(self.pool) == before
            return
        was = {key: self.naive.state[key] for key in keys}
        demand = self.pool.demand(keys)
        assert demand.hits == [(key, self.naive.slot[key]) for key in keys if was[key] == READY]
        assert demand.in_flight == [(key, self.naive.slot[key]) for key in keys if was[key] == LOADING]
        assert [key for key, _ in demand.misses] == [key for key in keys if was[key] == FREE]
        self.naive.demand(keys, demand.misses)

    @rule(keys=some_keys)
    def prefetch(self, keys):
        loads = self.pool.prefetch(keys)
        assert self.naive.prefetch(keys, loads) == len(loads)

    @rule(keys=some_keys)
    def defer(self, keys):
        keys = [key for key in keys if self.naive.state[key] in (FREE, LOADING)]
        loads = self.pool.defer(keys)
        assert self.naive.defer(keys, loads) == len(loads)

    @rule(index=any_index)
    def loaded(self, index):
        key = self.pick(index, LOADING)
        if key is not None:
            self.pool.loaded(key)
            self.naive.loaded(key)

    @rule()
    def all_loaded(self):
        for key in self.naive.in_state(LOADING):
            self.pool.loaded(key)
            self.naive.loaded(key)

    @rule(index=any_index)
    def pin(self, index):
        key = self.pick(index, READY)
        if key is not None:
            self.pool.pin(key)
            self.naive.pin(key)

    @rule(keys=some_keys)
    def release(self, keys):
        keys = [key for key in keys if self.naive.state[key] == PINNED]
        self.pool.release(keys)
        self.naive.release(keys)

    @rule()
    def release_all(self):
        keys = self.naive.in_state(PINNED)
        self.pool.release(keys)
        self.naive.release(keys)

    @rule(index=any_index, how=st.sampled_from(["cancel", "fail"]))
    def drop_loading(self, index, how):
        key = self.pick(index, LOADING)
        if key is not None:
            getattr(self.pool, how)(key)
            self.naive.drop_loading(key)

    @rule(keys=some_keys)
    def drop(self, keys):
        keys = [key for key in keys if self.naive.state[key] == READY]
        self.pool.drop(keys)
        self.naive.evict_now(keys)

    @rule()
    def tick(self):
        self.pool.tick()
        self.naive.scores.tick()

    @rule(num_slots=st.integers(0, 10))
    def borrow(self, num_slots):
        slots = self.pool.borrow(num_slots)
        assert self.naive.borrow(num_slots, slots) == len(slots)

    @rule(count=st.integers(0, 9))
    def give_back(self, count):
        slots = sorted(self.naive.borrowed)[:count]
        self.pool.give_back(slots)
        self.naive.give_back(slots)

    @rule(
        key=st.integers(0, NUM_KEYS - 1),
        event=st.sampled_from([("loaded", LOADING), ("pin", READY), ("cancel", LOADING), ("fail", LOADING)]),
    )
    def illegal(self, key, event):
        name, only_in = event
        if self.naive.state[key] != only_in:
            before = repr(self.pool)
            with pytest.raises(IllegalEvent, match=f"{name} of key {key}"):
                getattr(self.pool, name)(key)
            assert repr(self.pool) == before

    @rule(key=st.integers(0, NUM_KEYS - 1), slot=st.integers(0, 8))
    def illegal_event_of_many(self, key, slot):
        before = repr(self.pool)
        if self.naive.state[key] != PINNED:
            with pytest.raises(IllegalEvent, match="release"):
                self.pool.release([key])
        if self.naive.state[key] != READY:
            with pytest.raises(IllegalEvent, match="evict"):
                self.pool.drop([key])
        if slot not in self.naive.borrowed:
            with pytest.raises(IllegalEvent, match="not borrowed"):
                self.pool.give_back([slot])
        assert repr(self.pool) == before

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def same(self):
        pool, naive = self.pool, self.naive
        for key in range(NUM_KEYS):
            assert pool.state(key) == naive.state[key]
            assert pool.slot_of(key) == naive.slot.get(key, -1)
            assert pool.contains_ready(key) == (naive.state[key] in (READY, PINNED))
        assert (pool.evictions, pool.prefetch_used, pool.prefetch_wasted) == (
            naive.evictions,
            naive.used,
            naive.wasted,
        )
        assert pool.num_prefetched == len(naive.prefetched) <= pool.staging_slots
        assert pool.deferred == naive.deferred
        assert len(pool.deferred) <= pool.deferred_slots
        assert pool.num_resident == len(naive.slot)
        assert pool.num_free == len(naive.free)
        for layer, count in enumerate(pool.resident_per_layer):
            assert count == sum(key // KEYS_PER_LAYER == layer for key in naive.slot)

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def one_slot_one_holder(self):
        held = [slot for key in range(NUM_KEYS) if (slot := self.pool.slot_of(key)) >= 0]
        assert len(set(held) | self.naive.borrowed) == len(held) + len(self.naive.borrowed) <= self.pool.num_slots


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
