"""Reads that nobody waits for: what is filled and when, and how much of a guess the governor lets through."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from foreroute.engine.prefetcher import ReadsAhead
from foreroute.engine.stats import PhaseStats
from foreroute.predict.governor import Governor
from foreroute.residency import Lru, Residency
from foreroute.transfer.fake import FakeTransfer


def made(filling_slots: int = 2) -> tuple[ReadsAhead, Any, PhaseStats]:
    layers = [SimpleNamespace(num_experts=8, layout=SimpleNamespace(nbytes=100))] * 3
    table = SimpleNamespace(num_experts=8, layers=layers, expert_id=lambda key: SimpleNamespace(layer=key // 8))
    pool = Residency(12, 24, eviction=Lru(), staging_slots=4, filling_slots=filling_slots, keys_per_layer=8)
    runtime: Any = SimpleNamespace(
        table=table, residency=pool, transfer=FakeTransfer(), tracing=None, learner=None, key_nbytes=[100] * 24
    )
    return ReadsAhead(runtime), runtime, PhaseStats()


def filled(runtime: Any) -> list[int]:
    return [call[1] for call in runtime.transfer.calls if call[0] == "fill"]


def arrive(runtime: Any, key: int) -> None:
    runtime.transfer.finish(key)
    for completion in runtime.transfer.completed():
        runtime.residency.loaded(completion.key)


def test_the_second_time_and_then_again_the_second_time() -> None:
    ahead, runtime, phase = made()
    ahead.fill(1, [9], phase)
    assert filled(runtime) == []
    ahead.fill(1, [9], phase)
    assert filled(runtime) == [9]
    assert (phase.fill_loads, phase.fill_bytes) == (1, 100)
    arrive(runtime, 9)
    runtime.residency.drop([9])
    ahead.fill(1, [9], phase)
    assert filled(runtime) == [9], "once it was filled, it counts anew"
    ahead.fill(1, [9], phase)
    assert filled(runtime) == [9, 9]


def test_what_has_no_room_keeps_its_turn() -> None:
    ahead, runtime, phase = made(filling_slots=1)
    ahead.fill(1, [9, 10], phase)
    ahead.fill(1, [9, 10], phase)
    assert filled(runtime) == [9]
    arrive(runtime, 9)
    ahead.fill(1, [10], phase)
    assert filled(runtime) == [9, 10]


def test_a_prompt_takes_back_what_has_not_started() -> None:
    ahead, runtime, phase = made()
    ahead.fill(1, [9, 10], phase)
    ahead.fill(1, [9, 10], phase)
    ahead.prefetch(2, [3], phase)
    runtime.transfer.begin()  # the guess: it goes on
    ahead.drop_all(phase)
    assert runtime.residency.filling == set()
    assert runtime.transfer.in_flight == [19]
    assert (phase.fill_loads, phase.fill_bytes, phase.prefetch_loads) == (0, 0, 1)
    ahead.fill(1, [9], phase)
    assert filled(runtime)[-1] == 9, "it keeps its turn"


class Guesses:
    """Always the same four experts, and how often it was asked."""

    asked = 0

    def guess(self, layer: int, hidden: Any, ids: Any, weights: Any) -> list[int]:
        self.asked += 1
        return [1, 2, 3, 4]

    def guess_first(self, token_ids: Any) -> list[int]:
        self.asked += 1
        return [5, 6]


def governed(share: float, *, is_prefill: bool = False, is_exact: bool = True) -> tuple[ReadsAhead, Any, Governor]:
    """Reads ahead of a runtime in decode, with a governor that has chosen `share`; its clock ticks once a reading."""
    _, runtime, phase = made()
    governor, seconds = Governor(), itertools.count()
    governor.share = share
    runtime.predictor, runtime.phase, runtime.is_prefill = Guesses(), phase, is_prefill
    runtime.approximation = SimpleNamespace(is_exact=is_exact)
    return ReadsAhead(runtime, governor, lambda: float(next(seconds))), runtime, governor


def prefetched(runtime: Any) -> list[int]:
    return [call[1] for call in runtime.transfer.calls if call[0] == "prefetch"]


@pytest.mark.parametrize(("share", "keys"), [(1.0, [9, 10, 11, 12]), (0.5, [9, 10]), (0.0, [])])
def test_the_governor_decides_how_much_of_a_guess_is_fetched(share: float, keys: list[int]) -> None:
    reads, runtime, _ = governed(share)
    reads.begin_step(1, None)
    reads.guess_next(0, None, None, None)
    assert prefetched(runtime) == keys
    assert runtime.predictor.asked == (share > 0), "a guess that is not fetched is not made"
    assert runtime.phase.unguessed_steps == (share == 0)


@pytest.mark.parametrize("case", [{"is_prefill": True}, {"is_exact": False}], ids=str)
def test_prompts_and_other_policies_are_not_governed(case: dict[str, bool]) -> None:
    reads, runtime, governor = governed(0.0, **case)
    told: list[float] = []
    governor.step = lambda seconds, waited_s: told.append(seconds) or False
    reads.begin_step(1, None)
    reads.guess_next(0, None, None, None)
    reads.end_step()
    assert prefetched(runtime) == [9, 10, 11, 12]
    assert told == []
    assert runtime.phase.unguessed_steps == 0


def test_the_governor_is_told_what_a_step_took_and_waited_once_the_pool_is_full() -> None:
    reads, runtime, governor = governed(1.0)
    told: list[tuple[float, float]] = []
    governor.step = lambda seconds, waited_s: told.append((seconds, waited_s)) or False
    reads.begin_step(1, None)
    reads.end_step()
    assert told == [], "while the pool fills, steps get quicker whoever guesses"
    runtime.residency.demand(list(range(12)))
    runtime.phase.stall_s = 3.0
    reads.begin_step(1, None)
    runtime.phase.stall_s += 0.25
    reads.end_step()
    assert told == [(1.0, 0.25)]


def test_learning_stops_and_goes_on_with_the_guesses() -> None:
    reads, runtime, governor = governed(1.0)
    heard: list[str] = []
    runtime.learner = SimpleNamespace(pause=lambda: heard.append("pause"), resume=lambda: heard.append("resume"))
    for share in (0.0, 0.5):
        governor.share = share
        reads.begin_step(1, None)
    governor.share = 0.0
    runtime.approximation.is_exact = False  # other policies live by their guesses, whatever the governor had chosen
    reads.begin_step(1, None)
    assert heard == ["pause", "resume", "resume"]


def test_steps_of_other_batches_are_another_governors() -> None:
    reads, _, governor = governed(0.0)
    shares = []
    for rows in (1, 4, 1):
        reads.begin_step(rows, None)
        shares.append(reads.share)
    assert shares == [0.0, 1.0, 0.0]
    assert reads.governor is governor


def test_nothing_is_guessed_where_no_guess_can_be_brought() -> None:
    reads, runtime, _ = governed(1.0)
    runtime.residency.staging_slots = 0
    reads.begin_step(1, None)
    reads.guess_next(0, None, None, None)
    assert runtime.predictor.asked == 0


def test_a_prompt_restarts_a_trial() -> None:
    reads, _, governor = governed(1.0, is_prefill=True)
    paused: list[bool] = []
    governor.pause = lambda: paused.append(True)
    reads.begin_step(1, None)
    assert paused == [True]
