"""At the last moment: what arrived meanwhile is computed after all, and default vectors stand in for the rest."""

from types import SimpleNamespace
from typing import Any

import torch

from foreroute.engine.stats import PhaseStats
from foreroute.engine.substitution import StandingIn
from foreroute.predict.base import Seen
from foreroute.residency import Lru, Residency
from foreroute.residency.slots import LEASED, LOADING
from foreroute.transfer.fake import FakeTransfer

LATE, LATER, GONE = 9, 10, 11


class Step:
    """Notes what is computed and stood in for; `then` happens after the first is computed."""

    def __init__(self, then: Any = lambda: None) -> None:
        self.ran: list[int] = []
        self.stood_in: list[int] = []
        self._then = then

    def run(self, keys: list[int]) -> None:
        self.ran += keys
        self._then()

    def stand_in(self, keys: list[int], vectors: torch.Tensor) -> None:
        assert vectors.tolist() == [[key - 8.0] for key in keys]
        self.stood_in += keys


def at_last(step: Any, ended: list[int], failed: tuple[int, ...] = ()) -> tuple[list[int], Any]:
    """LATE and LATER are on their way, GONE is not; those that `ended` have ended when the layer is nearly done."""
    pool = Residency(12, 24, eviction=Lru(), staging_slots=4, filling_slots=2, keys_per_layer=8)
    transfer = FakeTransfer()
    runtime: Any = SimpleNamespace(
        table=SimpleNamespace(num_experts=8), residency=pool, transfer=transfer, phase=PhaseStats(),
        keeps_across_tokens=True, filled=[], tracing=None,
    )  # fmt: skip

    def settle(completions: Any) -> None:
        for completion in completions:
            (pool.fail if completion.error else pool.loaded)(completion.key)

    runtime.settle = settle
    runtime.ahead = SimpleNamespace(fill=lambda layer, keys, phase: runtime.filled.extend(keys))
    for key, slot in pool.prefetch([LATE, LATER]):
        transfer.prefetch(key, slot)
    for key in ended:
        transfer.finish(key)
    for key in failed:
        transfer.fail(key, OSError("gone"))
    approximation: Any = SimpleNamespace(
        vectors=lambda layer, experts: torch.tensor(experts, dtype=torch.float32)[:, None]
    )
    seen = Seen(torch.zeros(1, 4), torch.zeros(1, 2).long(), torch.zeros(1, 2))
    around = StandingIn(runtime, 1, [LATE, LATER, GONE], step, approximation, seen)
    step_finish = getattr(step, "finishes", None)
    if step_finish is not None:
        step._then = lambda: transfer.finish(step_finish) if step_finish in transfer.in_flight else None
    return around.at_last(), runtime


def test_what_arrived_is_computed_and_the_rest_stood_in_for() -> None:
    step = Step()
    leased, runtime = at_last(step, [LATE])
    assert leased == step.ran == [LATE]
    assert step.stood_in == runtime.filled == [LATER, GONE]
    assert (runtime.phase.hits, runtime.phase.stood_in) == (1, 2)
    assert runtime.residency.state(LATE) == LEASED
    assert runtime.residency.state(LATER) == LOADING


def test_it_looks_again_after_each_that_arrived() -> None:
    step: Any = Step()
    step.finishes = LATER
    leased, runtime = at_last(step, [LATE])
    assert leased == step.ran == [LATE, LATER]
    assert step.stood_in == [GONE]
    assert runtime.phase.hits == 2


def test_nothing_is_waited_for() -> None:
    step = Step()
    leased, runtime = at_last(step, [])
    assert leased == step.ran == []
    assert step.stood_in == [LATE, LATER, GONE]
    assert runtime.transfer.num_in_flight == 2


def test_a_failed_guess_is_stood_in_for() -> None:
    step = Step()
    leased, _ = at_last(step, [LATER], failed=(LATE,))
    assert leased == [LATER]
    assert step.stood_in == [LATE, GONE]
