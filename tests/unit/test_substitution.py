"""At the last moment: what arrived meanwhile is computed after all, and default vectors substitute the rest."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from foreroute.engine.moe_step import substitute_missing
from foreroute.engine.pool import ExpertPool
from foreroute.residency.eviction import Lru
from foreroute.residency.slots import LOADING, PINNED, Residency
from foreroute.types import ExpertKeys
from tests.support.fake_transfer import FakeTransfer

LATE, LATER, GONE = 9, 10, 11


class Output:
    """Notes what is computed and substituted; `then` happens after the first is computed."""

    def __init__(self, finishes: int | None = None) -> None:
        self.ran: list[int] = []
        self.substituted: list[int] = []
        self.finishes = finishes
        self.then: Callable[[], None] = lambda: None

    def add(self, experts: list[tuple[int, int]]) -> None:
        self.ran += [key for key, _ in experts]
        self.then()

    def substitute(self, keys: list[int], vectors: torch.Tensor) -> None:
        assert vectors.tolist() == [[key - 8.0] for key in keys]
        self.substituted += keys


def at_last(output: Any, ended: list[int], failed: tuple[int, ...] = ()) -> tuple[list[int], Any]:
    """LATE and LATER are in flight, GONE is not; those that `ended` have ended when the layer is nearly done."""
    residency = Residency(12, 24, eviction=Lru(), staging_slots=4, deferred_slots=2, keys_per_layer=8)
    transfer = FakeTransfer()
    pool: Any = ExpertPool(ExpertKeys.of([8] * 3), [100] * 24, residency, transfer)
    pool.prefetch(1, [LATE - 8, LATER - 8])
    for key in ended:
        transfer.finish(key)
    for key in failed:
        transfer.fail(key, OSError("gone"))
    policies: Any = SimpleNamespace(vectors=lambda layer, experts: torch.tensor(experts, dtype=torch.float32)[:, None])
    if output.finishes is not None:
        output.then = lambda: transfer.finish(output.finishes) if output.finishes in transfer.in_flight else None
    return substitute_missing(pool, policies, 1, [LATE, LATER, GONE], output), pool


def test_what_arrived_is_computed_and_the_rest_substituted() -> None:
    output = Output()
    pinned, pool = at_last(output, [LATE])
    assert pinned == output.ran == [LATE]
    assert output.substituted == [LATER, GONE]
    assert pool._substituted == {LATER, GONE}, "they are read the next time"
    assert (pool.phase.hits, pool.phase.substituted) == (1, 2)
    assert pool.residency.state(LATE) == PINNED
    assert pool.residency.state(LATER) == LOADING


def test_it_looks_again_after_each_that_arrived() -> None:
    output = Output(finishes=LATER)
    pinned, pool = at_last(output, [LATE])
    assert pinned == output.ran == [LATE, LATER]
    assert output.substituted == [GONE]
    assert pool.phase.hits == 2


def test_nothing_is_waited_for() -> None:
    output = Output()
    pinned, pool = at_last(output, [])
    assert pinned == output.ran == []
    assert output.substituted == [LATE, LATER, GONE]
    assert pool.transfer.num_in_flight == 2


def test_a_failed_guess_is_substituted() -> None:
    output = Output()
    pinned, _ = at_last(output, [LATER], failed=(LATE,))
    assert pinned == [LATER]
    assert output.substituted == [LATE, GONE]
