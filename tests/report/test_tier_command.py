"""`foreroute replay --tier`: a trace's decode steps on another machine."""

from pathlib import Path

import pytest

from foreroute.report.tier.forecast import parse_tier, recorded_tier
from foreroute.report.trace_file import read_recording
from tests.report import traces
from tests.report.traces import EXPERT_BYTES, NUM_LAYERS, TOP_K, routed, write

ROUTE = [[[0, 1], [2, 3]], [[1, 2], [0, 3]], [[0, 3], [0, 1]], [[2, 3], [1, 2]], [[0, 1], [2, 3]]] * 5


def test_with_every_expert_in_memory_it_is_bytes_over_bandwidth(tmp_path: Path, run) -> None:
    trace = routed(tmp_path / "run.jsonl", ROUTE)
    # 1 GB/s computes an expert of 1,000 bytes in 1 us; 2 GB of dense weights take 2 s; 5 us a layer beside them.
    ran = run("replay", trace, "--tier", "0.001,1,2,5", "--memory", "100%", "--json")
    assert ran.code == 0, ran.err
    (found,) = ran.json["tier"]
    assert found["resident_s"] == pytest.approx(NUM_LAYERS * (TOP_K * 1e-6 + 5e-6) + 2.0)
    assert found["on_demand"]["step_s"] == pytest.approx(found["resident_s"])
    assert found["on_demand"]["copied_bytes"] == 0
    assert found["prefetched"] is None  # the trace has no guesses


def test_a_small_pool_waits_for_the_link(tmp_path: Path, run) -> None:
    trace = routed(tmp_path / "run.jsonl", ROUTE)
    ran = run("replay", trace, "--tier", "0.001,1", "--memory", "62.5%", "--json")
    (found,) = ran.json["tier"]
    misses = found["on_demand"]["misses"]
    assert misses > 0
    assert found["on_demand"]["copied_bytes"] == pytest.approx(misses * EXPERT_BYTES)
    # 1 ms a copy, and nearly no compute: every copy is waited for.
    assert found["on_demand"]["stall_s"] == pytest.approx(misses * 1e-3, rel=0.01)
    told = run("replay", trace, "--tier", "0.001,1", "--memory", "62.5%")
    assert "simulated, not measured" in told.out
    assert "prefetched" in told.out


def test_guesses_of_the_trace_are_prefetched(tmp_path: Path, run) -> None:
    events: list[traces.Event] = [traces.header(num_slots=6, staging_slots=2)]
    at = 0.0
    for number, step in enumerate(ROUTE):
        events.append(traces.step(at, is_start=number == 0))
        events.append(traces.guess(at + 0.001, 1, step[1]))
        events += [
            traces.layer(at + 0.001 + 0.004 * layer, at + 0.004 + 0.004 * layer, layer, hits=keys)
            for layer, keys in enumerate(step)
        ]
        at += 0.01
    trace = write(tmp_path / "guessed.jsonl", *events, traces.end())
    ran = run("replay", trace, "--tier", "0.001,0.003", "--memory", "75%", "--json")
    (found,) = ran.json["tier"]
    assert found["prefetched"]["step_s"] < found["on_demand"]["step_s"]
    assert found["prefetched"]["misses"] < found["on_demand"]["misses"]


def test_compute_as_recorded_leaves_out_what_was_waited(tmp_path: Path) -> None:
    events: list[traces.Event] = [traces.header()]
    for number in range(6):
        at = 0.1 * number
        events += [
            traces.step(at, is_start=number == 0),
            traces.stall(at + 0.02, at + 0.03, 0),
            traces.layer(at + 0.01, at + 0.04, 0, hits=(0,), misses=(1,)),
            traces.layer(at + 0.05, at + 0.06, 1, hits=(2, 3)),
        ]
    recording = read_recording(write(tmp_path / "run.jsonl", *events, traces.end()))
    tier = recorded_tier(recording, 1e9)
    assert tier.before_s == pytest.approx((0.01, 0.01))
    assert tier.expert_s == pytest.approx((0.01, 0.005))
    assert tier.after_s == pytest.approx(0.04)
    assert parse_tier("1", recording) == tier


@pytest.mark.parametrize("text", ["", "fast", "25.7,", "0,768", "25.7,-1", "25.7,768,-2", "1,2,3,4,5", "nan,1"])
def test_a_tier_that_is_none_is_refused_with_what_it_takes(tmp_path: Path, run, text: str) -> None:
    ran = run("replay", routed(tmp_path / "run.jsonl", ROUTE), "--tier", text)
    assert ran.code == 2
    assert "GB/s of the link" in ran.err
