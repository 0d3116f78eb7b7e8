"""Turn runs into figures: medians and spread, each rung's gain over the one below, bounds. No model here."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from foreroute.bench.asked import Settled
from foreroute.bench.bounds import decode_bytes, prefill_bytes
from foreroute.bench.repeats import machine, software, summary
from foreroute.bench.run import Case
from foreroute.bench.rungs import BELADY, LADDER, RESIDENT
from foreroute.bench.session import Measurements, Run
from foreroute.engine.interfaces import summed

# One test's figures on one rung, by name; as in --json.
Figures = dict[str, Any]
PROMPT, TOKENS = "prompt", "tokens"


def as_json(settled: Settled, seen: Measurements, source: str) -> dict[str, Any]:
    """All figures, with the raw runs: what was `settled`, the runs `seen`, and the `source` of the token ids."""
    plan, asked = settled.plan, settled.asked
    return {
        "model": settled.folder.name,
        "model_type": plan.model_type,
        "machine": machine(),
        "software": software(),
        "experts": {
            "layers": plan.num_layers, "per_layer": plan.num_experts, "top_k": max(plan.top_k),
            "expert_bytes": plan.expert_bytes, "all_bytes": settled.whole_bytes, "stored_dtype": plan.stored_dtype,
            "source": plan.source, "token_demand_bytes": plan.token_demand_bytes,
        },
        "dense_bytes": plan.dense_bytes,
        "compute_dtype": plan.compute_dtype,
        "text": source,
        "repeats": asked.repeats,
        "remarks": list(settled.remarks),
        "interleaved": seen.interleaved,
        "interrupted": seen.is_interrupted,
        "same_tokens": seen.difference is None,
        "difference": None if seen.difference is None else asdict(seen.difference),
        "ceilings": ceilings(settled, seen),
        "budgets": [] if seen.difference is not None else budgets(settled, seen),
        "runs": [_raw(run, plan.expert_bytes) for run in seen.runs],
    }  # fmt: skip


def ceilings(settled: Settled, seen: Measurements) -> dict[str, Any]:
    """Speeds of disk and memory (as `seen`), and the least that a token of the `settled` model costs at them."""
    disk = [one.bytes_per_s for one in seen.disk]
    demand = settled.plan.token_demand_bytes
    copied = seen.memory_bytes_per_s
    return {
        "disk_bytes_per_s": summary(disk) if disk else None,
        "disk_is_direct": all(one.is_direct for one in seen.disk) if disk else None,
        "memory_bytes_per_s": copied,
        "token_from_disk_ms": 1e3 * demand / statistics.median(disk) if disk else None,
        "token_from_memory_ms": 1e3 * demand / copied if copied else None,
    }


def budgets(settled: Settled, seen: Measurements) -> list[dict[str, Any]]:
    """List one entry per `settled` memory and batch: the pool and, per test, the rungs `seen`, lowest first."""
    found = []
    for memory in settled.asked.memories:
        for batch in settled.asked.batches:
            tests = [
                test
                for case in settled.cases
                if case.batch == batch
                for test in _tests(settled, seen, memory, case)
                if test["rungs"]
            ]
            if tests:
                found.append({**_pool(seen, memory), "batch": batch, "tests": tests})
    return found


def _pool(seen: Measurements, memory: str) -> dict[str, Any]:
    """Slots that the budget buys, taken from any rung that ran with it."""
    plans = [plan for (at, name), plan in seen.plans.items() if at == memory and name != RESIDENT]
    plan = (plans or [plan for (at, _), plan in seen.plans.items() if at == memory])[0]
    return {
        "memory": memory,
        "memory_bytes": plan.pool_bytes,
        "num_slots": plan.num_slots,
        "total_slots": plan.total_slots,
        "resident_share": plan.resident_share,
        "token_demand_slots": plan.token_demand_slots,
        "peak_rss_bytes": {name: peak for (at, name), peak in seen.peak_rss_bytes.items() if at == memory},
    }


def _tests(settled: Settled, seen: Measurements, memory: str, case: Case) -> list[dict[str, Any]]:
    tests = []
    for kind, name in zip((PROMPT, TOKENS), case.tests, strict=False):
        rungs: dict[str, Figures] = {}
        runs_of: dict[str, list[Run]] = {}
        for rung in LADDER:
            runs = [run for run in seen.runs if (run.memory, run.rung, run.case) == (memory, rung.name, case)]
            warm = [run for run in runs if run.repeat > 0]
            if warm:
                runs_of[rung.name] = warm
                of = _prompt_figures if kind == PROMPT else _token_figures
                rungs[rung.name] = of(warm, settled.plan.expert_bytes)
                if case == settled.cases[0]:
                    rungs[rung.name]["cold_tokens_per_s"] = _tokens_per_s(runs[0], kind)
        has_bound = any(rung.name == BELADY for rung in settled.asked.rungs) and set(rungs) - {RESIDENT}
        bound = _bound(settled, seen, memory, case, kind, rungs) if has_bound else None
        if bound is not None:
            rungs[BELADY] = bound
        ordered = {rung.name: rungs[rung.name] for rung in LADDER if rung.name in rungs}
        _add_worth(ordered, runs_of, kind)
        tests.append({"test": name, "kind": kind, "prompt_tokens": case.prompt_tokens, "new_tokens": case.new_tokens,
                      "rungs": ordered})  # fmt: skip
    return tests


def _prompt_figures(runs: Sequence[Run], expert_bytes: int) -> Figures:
    phase = summed([run.timed.prefill for run in runs])
    return {
        "tokens_per_s": summary([_tokens_per_s(run, PROMPT) for run in runs]),
        "ttft_ms": summary([1e3 * run.timed.ttft_s for run in runs]),
        "read_mb": (phase.demand_bytes + phase.prefetch_bytes) / len(runs) / 1e6,
        "prefetch_mb": phase.prefetch_bytes / len(runs) / 1e6,
        "prefetch_wasted_mb": phase.prefetch_wasted * expert_bytes / len(runs) / 1e6,
        "stall_ms": 1e3 * phase.stall_s / len(runs),
    }


def _token_figures(runs: Sequence[Run], expert_bytes: int) -> Figures:
    """Figures of new tokens. Megabytes per token; stalls and TPOT per step, which gives several tokens in a batch."""
    phase = summed([run.timed.decode for run in runs])
    demanded = phase.hits + phase.late_hits + phase.misses
    return {
        "tokens_per_s": summary([_tokens_per_s(run, TOKENS) for run in runs]),
        "tpot_ms": summary([1e3 * (run.timed.tpot_s or 0.0) for run in runs]),
        "hit_rate": phase.hits / demanded if demanded else None,
        "late_hit_rate": phase.late_hits / demanded if demanded else None,
        "miss_rate": phase.misses / demanded if demanded else None,
        "demand_mb_per_token": phase.demand_bytes / phase.tokens / 1e6,
        "prefetch_mb_per_token": phase.prefetch_bytes / phase.tokens / 1e6,
        "prefetch_used_mb_per_token": phase.prefetch_used * expert_bytes / phase.tokens / 1e6,
        "prefetch_wasted_mb_per_token": phase.prefetch_wasted * expert_bytes / phase.tokens / 1e6,
        "stall_ms_per_step": 1e3 * phase.stall_s / phase.steps,
    }


def _bound(
    settled: Settled, seen: Measurements, memory: str, case: Case, kind: str, rungs: dict[str, Figures]
) -> Figures | None:
    """Belady's bytes, and the least time for them: the disk's, or compute's where that is longer.

    None where no such bound exists. The disk counts at its best measured speed: a bound errs on the fast side.
    """
    slots = next(plan.num_slots for (at, name), plan in seen.plans.items() if at == memory and name != RESIDENT)
    repeats = range(1, settled.asked.repeats + 1)
    nbytes: list[int] = []
    for routes in (seen.routes[case, repeat] for repeat in repeats):
        at = len(routes) - case.num_decode_passes
        if kind == PROMPT:
            nbytes.append(prefill_bytes(routes[:at], slots, settled.expert_bytes))
            continue
        decoded = decode_bytes(routes[at:], slots, settled.expert_bytes)
        if decoded is None:
            return None
        nbytes.append(decoded)
    steps = 1 if kind == PROMPT else case.num_decode_passes
    step_tokens = case.batch * (case.prompt_tokens if kind == PROMPT else 1)
    step_bytes = statistics.mean(nbytes) / steps
    read_ms = 1e3 * step_bytes / max(one.bytes_per_s for one in seen.disk)
    compute_ms = _compute_ms(rungs, step_tokens, kind)
    step_ms = max(read_ms, compute_ms)
    if step_ms == 0:
        return None
    figures: Figures = {
        "tokens_per_s": summary([1e3 * step_tokens / step_ms]),
        "ttft_ms" if kind == PROMPT else "tpot_ms": summary([step_ms]),
        "read_ms": read_ms,
        "compute_ms": compute_ms,
    }
    if kind == PROMPT:
        return {**figures, "read_mb": step_bytes / 1e6}
    return {**figures, "demand_mb_per_token": step_bytes / case.batch / 1e6}


def _compute_ms(rungs: dict[str, Figures], step_tokens: int, kind: str) -> float:
    """Milliseconds of a step without loads: fully resident's, or a rung's less its stalls where that is smaller."""
    time, stall = ("ttft_ms", "stall_ms") if kind == PROMPT else ("tpot_ms", "stall_ms_per_step")
    found = [max(0.0, one[time]["median"] - one[stall]) for name, one in rungs.items() if name != RESIDENT]
    if RESIDENT in rungs:
        found.append(1e3 * step_tokens / rungs[RESIDENT]["tokens_per_s"]["median"])
    return float(min(found))


def _add_worth(rungs: dict[str, Figures], runs_of: dict[str, list[Run]], kind: str) -> None:
    """Add each rung's tokens per second as a multiple of the rung below, from repeats of the rounds with both."""
    below = None
    for name, figures in rungs.items():
        figures["below"] = below
        figures["times_below"] = None if below is None else _ratio(rungs, runs_of, below, name, kind)
        below = name


def _ratio(rungs: dict[str, Figures], runs_of: dict[str, list[Run]], below: str, name: str, kind: str) -> float:
    speeds = [
        {run.repeat: _tokens_per_s(run, kind) for run in runs_of[one]} if one in runs_of else None
        for one in (below, name)
    ]
    if speeds[0] is None or speeds[1] is None:
        return float(rungs[name]["tokens_per_s"]["median"] / rungs[below]["tokens_per_s"]["median"])
    both = speeds[0].keys() & speeds[1].keys()
    return statistics.median(speeds[1][repeat] / speeds[0][repeat] for repeat in both)


def _tokens_per_s(run: Run, kind: str) -> float:
    if kind == PROMPT:
        return run.case.batch * run.case.prompt_tokens / run.timed.ttft_s
    assert run.timed.tpot_s, "a case without new tokens has no such test"
    return run.case.batch / run.timed.tpot_s


def _raw(run: Run, expert_bytes: int) -> dict[str, Any]:
    timed = run.timed
    return {
        "memory": run.memory,
        "rung": run.rung,
        "batch": run.case.batch,
        "prompt_tokens": run.case.prompt_tokens,
        "new_tokens": run.case.new_tokens,
        "repeat": run.repeat,
        "ttft_s": timed.ttft_s,
        "tpot_s": timed.tpot_s,
        "expert_bytes": expert_bytes,
        "prefill": asdict(timed.prefill),
        "decode": asdict(timed.decode),
    }
