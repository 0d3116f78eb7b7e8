"""How much of a guess the governor lets through, and what follows the guesses."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foreroute.engine.interfaces import StepInfo
from foreroute.engine.pool import ExpertPool
from foreroute.engine.prefetcher import Prefetcher
from foreroute.predict.governor import Governor
from foreroute.residency.eviction import Lru
from foreroute.residency.slots import Residency
from foreroute.types import ExpertKeys
from tests.support.fake_transfer import FakeTransfer

DECODE = StepInfo("decode", 1, 1)


class Guesses:
    """Always the same four experts, and how often it was asked."""

    asked = 0

    def guess(self, layer: int, hidden: Any, ids: Any, weights: Any) -> list[int]:
        self.asked += 1
        return [1, 2, 3, 4]

    def guess_first(self, token_ids: Any, num_rows: Any = None) -> list[int]:
        self.asked += 1
        return [5, 6]


def governed(share: float, *, is_exact: bool = True) -> tuple[Prefetcher, Any, Governor, Guesses]:
    """A prefetcher with a governor that has chosen `share`; its clock ticks once a reading."""
    residency = Residency(12, 24, eviction=Lru(), staging_slots=4, deferred_slots=2, keys_per_layer=8)
    seconds = itertools.count()
    keys, transfer = ExpertKeys.of([8] * 3), FakeTransfer()
    pool = ExpertPool(keys, [100] * 24, residency, transfer, clock=lambda: float(next(seconds)))
    governor, guesses, policies = Governor(), Guesses(), SimpleNamespace(is_exact=is_exact)
    governor.share = share
    return Prefetcher(pool, guesses, policies, governor=governor), pool, governor, guesses


def prefetched(pool: Any) -> list[int]:
    return [call[1] for call in pool.transfer.calls if call[0] == "prefetch"]


@pytest.mark.parametrize(("share", "keys"), [(1.0, [9, 10, 11, 12]), (0.5, [9, 10]), (0.0, [])])
def test_the_governor_decides_how_much_of_a_guess_is_fetched(share: float, keys: list[int]) -> None:
    reads, pool, _, guesses = governed(share)
    reads.begin_step(DECODE)
    reads.guess_next(0, None, None, None)
    assert prefetched(pool) == keys
    assert guesses.asked == (share > 0), "a guess that is not fetched is not made"
    assert pool.phase.steps_without_prefetch == (share == 0)


@pytest.mark.parametrize("case", [{"is_prefill": True}, {"is_exact": False}], ids=str)
def test_prompts_and_other_policies_are_not_governed(case: dict[str, bool]) -> None:
    reads, pool, governor, _ = governed(0.0, is_exact=case.get("is_exact", True))
    told: list[float] = []
    governor.step = lambda seconds, waited_s: told.append(seconds) or False
    reads.begin_step(StepInfo("prefill" if case.get("is_prefill") else "decode", 1, 1))
    reads.guess_next(0, None, None, None)
    reads.end_step()
    assert prefetched(pool) == [9, 10, 11, 12]
    assert told == []
    assert pool.phase.steps_without_prefetch == 0


def test_the_governor_is_told_what_a_step_took_and_waited_once_the_pool_is_full() -> None:
    reads, pool, governor, _ = governed(1.0)
    told: list[tuple[float, float]] = []
    governor.step = lambda seconds, waited_s: told.append((seconds, waited_s)) or False
    reads.begin_step(DECODE)
    reads.end_step()
    assert told == [], "while the pool fills, steps get faster with or without prefetch"
    pool.residency.demand(list(range(12)))
    pool.phase.stall_s = 3.0
    reads.begin_step(DECODE)
    pool.phase.stall_s += 0.25
    reads.end_step()
    assert told == [(1.0, 0.25)]


def test_steps_of_other_batches_are_another_governors() -> None:
    reads, _, governor, _ = governed(0.0)
    shares = []
    for rows in (1, 4, 1):
        reads.begin_step(StepInfo("decode", rows, 1))
        shares.append(reads.share)
    assert shares == [0.0, 1.0, 0.0]
    assert reads.governor is governor


def test_nothing_is_guessed_where_no_guess_can_be_brought() -> None:
    reads, pool, _, guesses = governed(1.0)
    pool.residency.staging_slots = 0
    reads.begin_step(DECODE)
    reads.guess_next(0, None, None, None)
    assert guesses.asked == 0


def test_a_prompt_restarts_a_trial() -> None:
    reads, _, governor, _ = governed(1.0)
    paused: list[bool] = []
    governor.pause = lambda: paused.append(True)
    reads.begin_step(StepInfo("prefill", 1, 1))
    assert paused == [True]


@pytest.mark.parametrize(("phase", "asked"), [("decode", 1), ("prefill", 0)])
def test_layer_0_is_guessed_from_the_token_of_a_decode_step(phase: Any, asked: int) -> None:
    reads, pool, _, guesses = governed(1.0)
    reads.begin_step(StepInfo.of(phase, torch.tensor([[7]])))
    assert guesses.asked == asked
    assert prefetched(pool) == [5, 6] * asked
