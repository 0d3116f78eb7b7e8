"""What a trace says of a run is what the engine counted of it, and tracing changes nothing."""

import errno
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import foreroute
from foreroute import EngineConfig
from foreroute.errors import ForerouteError, TraceError
from foreroute.trace import open_trace
from tests.support.runs import Output, assert_same_bits, generate


def traced(folder: Path, trace: Path | None, **config: Any) -> tuple[Output, Any]:
    """A generation with a quarter of the experts, and the engine's counts of it."""
    asked = EngineConfig(trace=None if trace is None else str(trace), **config)
    model = foreroute.load(folder, "25%", "float32", config=asked)
    output = generate(model)
    stats = model.foreroute.stats()
    model.foreroute.close()
    return output, stats


def events_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Output, Any, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("trace") / "run.jsonl"
    output, stats = traced(checkpoints.get("qwen3_moe"), path)
    return output, stats, events_of(path)


def test_tracing_changes_no_bit(run, checkpoints: Any) -> None:
    untraced, _ = traced(checkpoints.get("qwen3_moe"), None)
    assert_same_bits(run[0], untraced)


def test_a_trace_begins_with_its_model_and_ends_with_its_counts(run) -> None:
    _, stats, events = run
    header, last = events[0], events[-1]
    assert (header["event"], header["version"], header["model_type"]) == ("header", 2, "qwen3_moe")
    assert len(header["experts_per_layer"]) == len(header["top_k"]) == len(header["expert_bytes"]) > 1
    assert last["event"] == "end"
    assert last["stats"]["decode"]["hits"] == stats.decode.hits
    assert [event["event"] for event in events].count("header") == 1


def test_every_demanded_expert_is_a_hit_late_or_missed_as_the_engine_counted(run) -> None:
    _, stats, events = run
    layers = [event for event in events if event["event"] == "layer"]
    phases = {True: stats.prefill, False: stats.decode}
    for is_prefill, phase in phases.items():
        own = [event for event in layers if ("counts" in event) == is_prefill]
        assert own
        counted = [sum(len(event[kind]) for event in own) for kind in ("hits", "late_hits", "misses")]
        assert counted == [phase.hits, phase.late_hits, phase.misses]
        for event in own:
            routed = (
                {expert for expert, _ in event["counts"]}
                if is_prefill
                else {expert for row in event["ids"] for expert in row}
            )
            assert sorted(event["hits"] + event["late_hits"] + event["misses"]) == sorted(routed)


def test_loads_are_those_that_were_counted_and_lie_in_time(run) -> None:
    _, stats, events = run
    loads = [event for event in events if event["event"] == "load"]
    why = Counter(event["why"] for event in loads)
    assert why["demand"] == stats.prefill.demand_loads + stats.decode.demand_loads > 0
    in_flight_at_the_end = stats.prefill.prefetch_loads + stats.decode.prefetch_loads - why["prefetch"]
    assert 0 <= in_flight_at_the_end <= 4
    assert why["prefetch"] > 0
    assert all(event["asked"] <= event["begun"] <= event["t"] for event in loads)
    stalled_s = sum(event["end"] - event["t"] for event in events if event["event"] == "stall")
    assert stalled_s == pytest.approx(stats.prefill.stall_s + stats.decode.stall_s, abs=1e-3)


def test_what_is_evicted_was_loaded_before_and_is_there_no_more(run) -> None:
    resident: set[tuple[int, int]] = set()
    num_evicted = 0
    for event in run[2]:
        expert = (event.get("layer"), event.get("expert"))
        if event["event"] == "load":
            resident.add(expert)
        elif event["event"] == "evict":
            assert expert in resident
            resident.remove(expert)
            num_evicted += 1
        elif event["event"] == "layer" and "ids" in event:
            assert all((event["layer"], hit) in resident for hit in event["hits"])
    assert num_evicted > 10


def test_a_chrome_trace_has_spans_and_named_rows(checkpoints: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    _, stats = traced(checkpoints.get("qwen3_moe"), path)
    events = json.loads(path.read_text())
    phases = Counter(event["ph"] for event in events)
    assert phases["M"] > 4
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events if event["ph"] == "X")
    reads = [event for event in events if event["ph"] == "X" and event["name"].startswith("demand")]
    assert len(reads) == stats.prefill.demand_loads + stats.decode.demand_loads


def test_another_ending_and_a_file_that_is_no_trace_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"\.jsonl"):
        open_trace(tmp_path / "run.txt")
    mine = tmp_path / "mine.json"
    mine.write_text('{"precious": 1}')
    with pytest.raises(TraceError, match="is not a trace"):
        open_trace(mine)
    assert mine.read_text() == '{"precious": 1}'
    with pytest.raises(TraceError, match="cannot be written"):
        open_trace(tmp_path / "absent" / "run.jsonl")


def test_an_older_trace_stays_until_there_is_a_new_one(checkpoints: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    traced(checkpoints.get("qwen3_moe"), path)
    before = path.read_text()
    with pytest.raises(ForerouteError):
        foreroute.load(tmp_path, "25%", config=EngineConfig(trace=str(path)))
    assert path.read_text() == before
    traced(checkpoints.get("qwen3_moe"), path)
    assert path.read_text().count('"event":"header"') == 1


def test_a_full_disk_ends_the_trace_and_not_the_run(checkpoints: Any, tmp_path: Path, run: Any) -> None:
    path = tmp_path / "run.jsonl"
    model = foreroute.load(checkpoints.get("qwen3_moe"), "25%", "float32", config=EngineConfig(trace=str(path)))

    def full(event: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "no room")

    model.foreroute.engine.pool._next_observers[0]._trace._sink.write = full
    assert_same_bits(generate(model), run[0])
    with pytest.raises(TraceError, match="No space left"):
        model.foreroute.close()
    assert model.foreroute.engine.kernels[0].views._memory is None
    model.foreroute.close()


def test_two_models_do_not_write_one_trace(checkpoints: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    first = open_trace(path)
    with pytest.raises(TraceError, match="another model is writing it"):
        open_trace(path)
    first.close()
    open_trace(path).close()


def test_a_step_that_breaks_off_empties_the_pool_in_the_trace_too(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.jsonl"
    asked = EngineConfig(trace=str(path))
    model = foreroute.load(checkpoints.get("qwen3_moe"), "25%", "float32", config=asked)
    views, calls = model.foreroute.engine.kernels[0].views, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return operands(*args)

    operands = views.operands
    monkeypatch.setattr(views, "operands", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model)
    generate(model)
    model.foreroute.close()
    resident: set[tuple[int, int]] = set()
    for event in events_of(path):
        expert = (event.get("layer"), event.get("expert"))
        if event["event"] == "load":
            assert expert not in resident, "it was there, and is read again"
            resident.add(expert)
        elif event["event"] == "evict":
            resident.remove(expert)
