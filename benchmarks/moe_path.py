"""What a MoE layer costs beside its kernels: one token, every expert resident, quantised.

    python -m benchmarks.moe_path build/synth128 --packed build/synth128.q4_k.foreroute

Two figures per layer and token, of decode steps. *Kernels*: ggml's graphs (products and gating). *Beyond*: all else
between the call of the experts' module and its answer: routing read back, residency, guesses, the sum.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch
from transformers import DynamicCache

from benchmarks import _harness
from foreroute import EngineConfig
from foreroute.engine.interfaces import StepInfo
from foreroute.kernels.ggml.graph import Graph
from foreroute.model.caches import cache_argument


class Timed:
    """A function that adds up its time."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0
        self.each: list[float] = []

    def __call__(self, *args: Any) -> Any:
        began = time.perf_counter()
        result = self.function(*args)
        elapsed = time.perf_counter() - began
        self.seconds += elapsed
        self.each.append(elapsed)
        return result


def decode(model: Any, tokens: int) -> float:
    """Greedy decoding from one token on; the median step in seconds."""
    cache, seconds = DynamicCache(), []
    token = torch.tensor([[11]])
    with torch.inference_mode():
        for _ in range(tokens):
            began = time.perf_counter()
            token = model(token, **cache_argument(cache), use_cache=True).logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def fill(model: Any) -> None:
    """Every expert into the pool: a layer at a time, many tokens with routes that cover all."""
    engine, width = model.foreroute.engine, model.config.get_text_config().hidden_size
    with torch.inference_mode():
        engine.begin_step(StepInfo("prefill", 1, 2))
        for layer, entry in enumerate(model.foreroute.table.layers):
            ids = torch.arange(entry.num_experts)[:, None]
            hidden = torch.zeros(entry.num_experts, width, dtype=model.dtype)
            engine.compute(layer, hidden, ids, torch.ones_like(ids, dtype=model.dtype))


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--packed", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    model = foreroute.load(asked.model, "100%", config=EngineConfig(packed=str(asked.packed)))
    fill(model)
    decode(model, asked.tokens)
    engine = model.foreroute.engine
    untimed, graph_run = engine.compute, Graph.run
    layers = model.foreroute.plan.num_layers
    raw: dict[str, list[float]] = {"kernels_us": [], "beyond_us": [], "compute_us": [], "tpot_ms": []}
    before = model.foreroute.stats()
    for _ in range(asked.repeats):
        raw["tpot_ms"].append(1e3 * decode(model, asked.tokens))
        # Without timers in the kernels first: the whole of it.
        engine.compute = compute = Timed(untimed)
        decode(model, asked.tokens)
        raw["compute_us"].append(1e6 * statistics.median(compute.each[layers:]))
        engine.compute = compute = Timed(untimed)
        graphs = Timed(graph_run)
        Graph.run = lambda graph, timed=graphs: timed(graph)  # type: ignore[method-assign]
        try:
            decode(model, asked.tokens)
        finally:
            Graph.run = graph_run  # type: ignore[method-assign]
            engine.compute = untimed
        calls = len(compute.each)
        inside = graphs.seconds / calls
        raw["kernels_us"].append(1e6 * inside)
        raw["beyond_us"].append(1e6 * (compute.seconds / calls - inside))
    stats = model.foreroute.stats().minus(before).decode
    assert stats.misses == 0, "every expert is meant to be resident"
    result = {
        "model": asked.model.name, "packed": asked.packed.name,
        **{name: _harness.summary(values) for name, values in raw.items()},
    }  # fmt: skip
    model.foreroute.close()
    _harness.record(f"moe-path-{asked.packed.name.removesuffix('.foreroute')}", _harness.rounded(result), raw)


if __name__ == "__main__":
    main()
