"""The pool in any order of verbs, and after a step that was cut off anywhere."""

import itertools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from foreroute.engine.moe_step import ExpertStream
from foreroute.engine.pool import ExpertPool
from foreroute.residency.slots import FREE, LOADING, PINNED, READY
from tests.support.pools import DECODE, EXPERTS, LAYERS, NBYTES, PROMPT, WEIGHTS, made_pool


class Broken(Exception):
    """What a step is cut off with."""


def breaking(target: Any, name: str, after: int) -> Callable[[], None]:
    """Make the `after`th call from now on raise; return a function that restores it."""
    original, calls = getattr(target, name), itertools.count()

    def call(*arguments: Any) -> Any:
        if next(calls) == after:
            raise Broken
        return original(*arguments)

    setattr(target, name, call)
    return lambda: setattr(target, name, original)


def a_step(pool: ExpertPool) -> None:
    """Everything that the pool offers, in the order of a step."""
    pool.begin_step(DECODE)
    for layer in range(LAYERS):
        base = layer * EXPERTS
        pool.begin_layer(layer, [[base, base + 1]], WEIGHTS)
        pool.settle()
        pool.cancel_mispredicted(layer, [base])
        ready, waiting = pool.demand(layer, [base, base + 1])
        if layer + 1 < LAYERS:
            pool.prefetch(layer + 1, [0, 2])
        while waiting:
            ready += pool.wait(waiting)
        pinned = pool.pin_arrived([base + 2])
        pool.substitute([base + 3])
        pool.release([key for key, _ in ready + pinned])
        pool.end_layer()
    pool.begin_step(PROMPT)
    stream = ExpertStream(pool, 0, list(range(EXPERTS)))
    for key in range(EXPERTS):
        stream.slot_of(key)
    stream.close()


POINTS = [
    *(("residency", name) for name in ("demand", "prefetch", "defer", "loaded", "pin", "release", "tick", "borrow")),
    ("residency", "give_back"),
    *(("transfer", name) for name in ("demand", "prefetch", "defer", "promote", "cancel", "completed", "wait")),
]


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize(("part", "name"), POINTS, ids=lambda value: str(value))
def test_it_starts_over_wherever_a_step_is_cut_off(part: str, name: str, after: int) -> None:
    pool, transfer, _ = made_pool(num_slots=7)
    a_step(pool)
    mend = breaking(getattr(pool, part), name, after)
    try:
        a_step(pool)
        a_step(pool)
    except Broken:
        pass
    finally:
        mend()
    pool.reset()
    assert (transfer.num_in_flight, transfer.in_flight) == (0, [])
    assert pool.residency.num_free == pool.residency.num_slots
    fresh, _, _ = made_pool(num_slots=7)
    before = [asdict(pool.snapshot()), asdict(fresh.snapshot())]
    for one in (pool, fresh):
        for _ in range(3):
            a_step(one)
    after_it = [asdict(pool.snapshot()), asdict(fresh.snapshot())]
    ours, theirs = (
        {phase: {name: now[phase][name] - was[phase][name] for name in now[phase]} for phase in ("prefill", "decode")}
        for now, was in zip(after_it, before, strict=True)
    )
    assert ours == theirs, "it does what a new pool does"


# Any order of verbs.


class PoolMachine(RuleBasedStateMachine):
    """Counts, observers, residency and transfer agree, whatever is asked of the pool."""

    @initialize()
    def start(self) -> None:
        self.pool, self.transfer, self.notes = made_pool(num_slots=10)
        self.waiting: dict[int, int] = {}
        self.pinned: list[int] = []

    @rule(layer=st.integers(0, LAYERS - 1), experts=st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=3))
    def demand(self, layer: int, experts: set[int]) -> None:
        if self.waiting or self.pinned:
            return
        ready, self.waiting = self.pool.demand(layer, [layer * EXPERTS + expert for expert in sorted(experts)])
        self.pinned = [key for key, _ in ready]

    @rule()
    def wait(self) -> None:
        if self.waiting:
            self.pinned += [key for key, _ in self.pool.wait(self.waiting)]

    @rule()
    def release(self) -> None:
        if not self.waiting:
            self.pool.release(self.pinned)
            self.pinned = []

    @rule(layer=st.integers(0, LAYERS - 1), experts=st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=4))
    def prefetch(self, layer: int, experts: list[int]) -> None:
        self.pool.prefetch(layer, experts)

    @rule(layer=st.integers(0, LAYERS - 1), wanted=st.sets(st.integers(0, EXPERTS - 1)))
    def cancel(self, layer: int, wanted: set[int]) -> None:
        self.pool.cancel_mispredicted(layer, {layer * EXPERTS + expert for expert in wanted} | set(self.waiting))

    @rule(layer=st.integers(0, LAYERS - 1), experts=st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=3))
    def substitute(self, layer: int, experts: list[int]) -> None:
        keys = [layer * EXPERTS + expert for expert in experts]
        loadable = [
            key for key in keys if self.pool.residency.state(key) in (FREE, LOADING) and key not in self.waiting
        ]
        self.pool.substitute(loadable)

    @rule()
    def begin_a_read(self) -> None:
        if len(self.transfer.in_flight) > len(self.transfer._running):
            self.transfer.begin()

    @rule(data=st.data())
    def finish_a_read(self, data: st.DataObject) -> None:
        others = [key for key in self.transfer.in_flight if key not in self.waiting]
        if others:
            self.transfer.finish(data.draw(st.sampled_from(others)))

    @rule()
    def settle(self) -> None:
        if not self.waiting:
            self.pool.settle()

    @rule()
    def step(self) -> None:
        if not self.waiting and not self.pinned:
            self.pool.begin_step(DECODE)

    @rule()
    def reset(self) -> None:
        self.pool.reset()
        self.waiting, self.pinned = {}, []

    @invariant()
    def slots_add_up(self) -> None:
        residency = self.pool.residency
        states = [residency.state(key) for key in range(residency.num_keys)]
        assert residency.num_free + residency.num_resident == residency.num_slots
        assert [key for key, state in enumerate(states) if state == PINNED] == sorted(self.pinned)
        done = {one.key for one in self.transfer._done}
        assert {key for key, state in enumerate(states) if state == LOADING} == set(self.transfer.in_flight) | done
        assert all(state in (FREE, LOADING, READY, PINNED) for state in states)

    @invariant()
    def counts_are_what_was_told(self) -> None:
        phase, found = self.pool.stats.decode, self.notes.of("looked_up")
        assert [phase.hits, phase.late_hits, phase.misses] == [sum(len(one[at]) for one in found) for at in range(3)]
        assert phase.demand_loads == phase.misses
        assert phase.substituted == sum(len(keys) for (keys,) in self.notes.of("substituted"))
        assert phase.prefetch_bytes == NBYTES * phase.prefetch_loads
        assert phase.deferred_loads == sum(len(keys) for (keys,) in self.notes.of("deferred"))
        assert phase.layers == len(found)


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_a_guess_that_it_forgot_is_not_withdrawn() -> None:
    pool, _, _ = made_pool()
    pool.prefetch(1, [0])
    pool.reset()
    for _ in range(2):
        pool.defer([8])
    pool.cancel_mispredicted(1, [])
    assert pool.phase.prefetch_cancelled == 0, "it is a deferred load now"


def test_a_deferred_load_that_it_forgot_is_not_taken_for_one() -> None:
    pool, _, _ = made_pool()
    for _ in range(2):
        pool.defer([9])
    pool.reset()
    pool.prefetch(1, [1])
    pool.cancel_mispredicted(1, [9])
    for _ in range(2):
        pool.defer([9])
    assert pool.residency.deferred == {9}, "a prefetch that comes too late"
    pool.cancel_queued()
    assert (pool.phase.prefetch_loads, pool.phase.deferred_loads) == (0, 1)
