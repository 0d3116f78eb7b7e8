"""Figures from runs made by hand: which runs count, what is divided by what, and what a rung is worth."""

from dataclasses import replace
from pathlib import Path

import pytest

from foreroute.bench.asked import Settled
from foreroute.bench.bandwidth import Bandwidth
from foreroute.bench.results import as_json, budgets
from foreroute.bench.run import Case, Timed
from foreroute.bench.rungs import BELADY, CACHE, ON_DEMAND, RESIDENT, rungs_named
from foreroute.bench.session import Measurements, Run, TokenMismatch
from foreroute.config import Plan
from foreroute.engine.interfaces import PhaseStats

CASE = Case(2, 10, 5)
PLAN = Plan(
    folder="m", model_type="t", num_layers=1, num_experts=4, top_k=(1,), expert_bytes=1000, total_expert_bytes=4000,
    dense_bytes=0, memory_bytes=2000, memory_was_chosen=False, slot_bytes=1000, num_slots=2, total_slots=4,
    slot_classes=((1000, 2),), token_slot_bytes=1000, all_slot_bytes=4000,
    token_demand_slots=1, staging_slots=1, source="packed", stored_dtype="BF16", compute_dtype="bfloat16",
    predictor="lookahead", math="own", prefill_chunk=2048,
)  # fmt: skip
# Steps alternate among three experts: with two slots a cache that knows the future misses every other step.
ROUTES = [[[0, 1, 2, 3]], *([[[0]], [[1]], [[2]], [[0]]])]


def run_of(rung: str, repeat: int, ttft_s: float, tpot_s: float, **decode: float) -> Run:
    counts = PhaseStats(**{"steps": 4, "tokens": 8, **decode})  # type: ignore[arg-type]
    return Run("50%", rung, CASE, repeat, Timed(ttft_s, tpot_s, [], PhaseStats(demand_bytes=3000), counts))


@pytest.fixture
def settled(asked) -> Settled:
    asked = replace(asked, memories=("50%",), batches=(2,), rungs=rungs_named([ON_DEMAND, CACHE, BELADY, RESIDENT]))
    return Settled(Path("m"), asked, (), (CASE,), {"50%": 2000}, PLAN, 4000, 9, (4,), (1000,), lambda key: (), str)


@pytest.fixture
def seen() -> Measurements:
    runs = [
        run_of(ON_DEMAND, 0, 90.0, 90.0, misses=99), run_of(CACHE, 0, 90.0, 90.0, misses=99),
        run_of(ON_DEMAND, 1, 2.0, 0.4, misses=4, demand_bytes=4000, stall_s=1.0),
        run_of(ON_DEMAND, 2, 2.0, 0.8, misses=4, demand_bytes=4000, stall_s=3.0),
        run_of(CACHE, 2, 1.0, 0.4, hits=2, late_hits=1, misses=1, demand_bytes=1000, prefetch_bytes=3000,
               prefetch_used=2, prefetch_wasted=1),
        run_of(CACHE, 1, 1.0, 0.1, hits=3, late_hits=0, misses=1, demand_bytes=1000),
    ]  # fmt: skip
    plans = {("50%", name): PLAN for name in (ON_DEMAND, CACHE)}
    disk = Bandwidth(bytes_per_s=10_000.0, expert_ms=1.0, num_experts=1, num_reads=1, elapsed_s=1.0, is_direct=True)
    routes = {(CASE, repeat): ROUTES for repeat in range(3)}
    return Measurements(runs=runs, plans=plans, routes=routes, disk=[disk], memory_bytes_per_s=1e6)


def rungs_of(settled: Settled, seen: Measurements, test: str) -> dict:
    (budget,) = budgets(settled, seen)
    return next(one["rungs"] for one in budget["tests"] if one["test"] == test)


def test_tokens_of_all_rows_count_and_the_run_that_warms_up_does_not(settled, seen):
    rungs = rungs_of(settled, seen, "tg5")
    on_demand, cache = rungs[ON_DEMAND], rungs[CACHE]
    assert on_demand["tpot_ms"]["median"] == pytest.approx(600)
    # Two rows a step: 5 and 2.5 tokens per second.
    assert on_demand["tokens_per_s"]["median"] == pytest.approx(3.75)
    assert on_demand["cold_tokens_per_s"] == pytest.approx(2 / 90)
    assert on_demand["demand_mb_per_token"] == pytest.approx(8000 / 16 / 1e6)
    assert on_demand["stall_ms_per_step"] == pytest.approx(4000 / 8)
    assert (cache["hit_rate"], cache["late_hit_rate"], cache["miss_rate"]) == (5 / 8, 1 / 8, 2 / 8)
    assert cache["prefetch_used_mb_per_token"] == pytest.approx(2000 / 16 / 1e6)
    assert cache["prefetch_wasted_mb_per_token"] == pytest.approx(1000 / 16 / 1e6)


def test_a_rung_is_compared_with_the_one_below_within_a_round(settled, seen):
    rungs = rungs_of(settled, seen, "tg5")
    assert (rungs[ON_DEMAND]["below"], rungs[ON_DEMAND]["times_below"]) == (None, None)
    assert rungs[CACHE]["below"] == ON_DEMAND
    # 4 in the first round and 2 in the second; the medians' ratio would be 2.4.
    assert rungs[CACHE]["times_below"] == pytest.approx(3.0)
    assert rungs_of(settled, seen, "pp10")[CACHE]["times_below"] == pytest.approx(2.0)


def test_the_bound_is_the_disks_time_for_beladys_bytes_or_computes(settled, seen):
    bound = rungs_of(settled, seen, "tg5")[BELADY]
    # One load beside the two that fill the pool, over four steps of two rows.
    assert bound["demand_mb_per_token"] == pytest.approx(1000 / 4 / 2 / 1e6)
    assert bound["read_ms"] == pytest.approx(25)
    # Nothing is resident here: compute is what is left of the fastest when stalls are taken off.
    assert bound["compute_ms"] == pytest.approx(100)
    assert bound["tpot_ms"]["median"] == pytest.approx(100)
    prompt = rungs_of(settled, seen, "pp10")[BELADY]
    assert (prompt["read_mb"], prompt["ttft_ms"]["median"]) == (pytest.approx(0.002), pytest.approx(1000))

    seen.runs += [run_of(RESIDENT, repeat, 0.05, 0.01) for repeat in (0, 1, 2)]
    assert rungs_of(settled, seen, "tg5")[BELADY]["tpot_ms"]["median"] == pytest.approx(25)
    assert list(rungs_of(settled, seen, "tg5")) == [ON_DEMAND, CACHE, BELADY, RESIDENT]
    assert rungs_of(settled, seen, "pp10")[BELADY]["ttft_ms"]["median"] == pytest.approx(200)


def test_what_was_cut_off_shows_what_there_is(settled, seen):
    seen.runs = seen.runs[:3]
    rungs = rungs_of(settled, seen, "tg5")
    assert CACHE not in rungs
    assert rungs[ON_DEMAND]["tokens_per_s"]["repeats"] == 1
    seen.runs = seen.runs[:1]
    assert budgets(settled, seen) == []


def test_ceilings_and_no_times_where_tokens_differ(settled, seen):
    found = as_json(settled, seen, "text")
    assert found["ceilings"]["token_from_disk_ms"] == pytest.approx(100)
    assert found["ceilings"]["token_from_memory_ms"] == pytest.approx(1)
    assert found["same_tokens"]
    assert len(found["runs"]) == len(seen.runs)
    seen.difference = TokenMismatch("a", "b", CASE, 1, 1, 3)
    found = as_json(settled, seen, "text")
    assert not found["same_tokens"]
    assert found["budgets"] == []
