"""What measures guesses has all of them, whatever the governor would choose by the time that steps take."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks import predictor_cost, prefetch, record_traces
from foreroute.loading import engines
from foreroute.predict.governor import Governor

if TYPE_CHECKING:
    from tests.support.checkpoints import Checkpoints


def test_a_trace_has_the_guesses_of_every_decode_step(
    checkpoints: "Checkpoints", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A governor that switches prefetch off at once.
    monkeypatch.setattr(engines, "Governor", partial(Governor, (0.0,)))
    text = tmp_path / "text.txt"
    text.write_text("The sea is calm today. " * 10, encoding="utf-8")
    asked = [checkpoints.get("qwen3_moe"), "--memory", "25%", "--text", text, "--tokens", 1, 8, 8, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["record_traces", *map(str, asked)])
    record_traces.main()
    (trace,) = tmp_path.glob("*.jsonl")
    events = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    begun = [event["event"] == "step" and event["phase"] == "decode" for event in events].index(True)
    layers = events[0]["experts_per_layer"]
    guessed = [event["layer"] for event in events[begun:] if event["event"] == "guess"]
    assert guessed == list(range(len(layers))) * 8


def test_what_a_predictor_saves_and_costs_is_measured_without_the_governor(tmp_path: Path) -> None:
    assert not prefetch.config_of("lookahead", "lfu", tmp_path).governor
    assert not prefetch.config_of("fitted", "lfu", tmp_path).governor
    assert not predictor_cost.config_of("no").governor
