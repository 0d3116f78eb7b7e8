"""`plan` measures within a limit of time: what it computes of a model whose layers are slow, and how it says so."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import foreroute
from foreroute.cli.commands import plan as plan_command
from foreroute.cli.commands.plan import Findings
from foreroute.cli.probes import ComputeTime, measure_compute
from foreroute.memory.kv import kv_bytes_per_token, planned_kv_bytes_per_token
from tests.cli.harness import NUM_LAYERS
from tests.cli.test_plan import found  # noqa: F401  a fixture

LIMIT_S = 3.0


class SlowLayers:
    """A model's MoE layers, each of which takes `layer_s` by a clock of its own."""

    def __init__(self, model: Any, layer_s: float) -> None:
        self.now_s = self.num_computed = 0.0
        for layer in model.foreroute.layers:
            layer.experts.engine_forward = self._slow(layer.experts.engine_forward, layer_s)

    def clock(self) -> float:
        """Seconds."""
        return self.now_s

    def _slow(self, forward: Any, layer_s: float) -> Any:
        def slow(*args: Any) -> torch.Tensor:
            self.now_s += layer_s
            self.num_computed += 1
            result: torch.Tensor = forward(*args)
            return result

        return slow


@pytest.mark.parametrize(
    ("layer_s", "ms", "passes", "layers", "computed"),
    [
        (0.25, 1000, 1, NUM_LAYERS, 3 * NUM_LAYERS),  # two to warm up, one that is timed
        (0.5, 2000, 1, NUM_LAYERS, NUM_LAYERS + 2),  # the second one is cut
        (2.0, 8000, 0, 2, 2),
        (60.0, 240_000, 0, 1, 1),
    ],
)
def test_no_layer_is_begun_after_the_limit(
    tiny: Path, layer_s: float, ms: float, passes: int, layers: int, computed: int
) -> None:
    model = foreroute.load(tiny, "50%")
    slow = SlowLayers(model, layer_s)
    measured = measure_compute(model, limit_s=LIMIT_S, clock=slow.clock)
    assert (measured.num_passes, measured.num_layers, slow.num_computed) == (passes, layers, computed)
    assert measured.ms == pytest.approx(ms, rel=0.1)  # less what reads took by the engine's clock
    model.foreroute.close()


def test_a_model_whose_pass_was_cut_computes_on(tiny: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    model, other = foreroute.load(tiny, "50%"), foreroute.load(tiny, "50%")
    forwards = [layer.experts.engine_forward for layer in model.foreroute.layers]
    measure_compute(model, limit_s=LIMIT_S, clock=SlowLayers(model, 2.0).clock)
    for layer, forward in zip(model.foreroute.layers, forwards, strict=True):
        layer.experts.engine_forward = forward
    assert torch.equal(model(ids).logits, other(ids).logits)
    model.foreroute.close()
    other.foreroute.close()


def test_the_cache_is_measured_without_experts(tiny: Path) -> None:
    """Two more forward passes would take as long as two tokens."""
    model = foreroute.load(tiny, "50%")
    expected = kv_bytes_per_token(model)
    slow = SlowLayers(model, 1.0)
    assert planned_kv_bytes_per_token(model) == expected > 0
    assert slow.num_computed == 0
    kv_bytes_per_token(model)
    assert slow.num_computed == 2 * NUM_LAYERS, "and experts are computed again afterwards"
    model.foreroute.close()


def test_what_is_extrapolated_is_said(found: Findings, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    plan_command.show(replace(found, compute=ComputeTime(8000.0, 0, 2)), [])
    text = capsys.readouterr().out
    assert f"from 2 of {NUM_LAYERS} layers, measured" in text
    assert "measured: one token" not in text
    measured = plan_command.as_json(replace(found, compute=ComputeTime(8000.0, 0, 2)))["measured"]
    assert (measured["compute_ms"], measured["compute_passes"], measured["compute_layers"]) == (8000.0, 0, 2)
    plan_command.show(found, [])
    assert "measured: one token, its experts in memory" in capsys.readouterr().out
