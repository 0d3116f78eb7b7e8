"""What a MoE layer costs beside its kernels: one token, every expert resident, quantised.

    python -m benchmarks.moe_path build/synth128 --packed build/synth128.int4.foreroute

Three figures per layer and token. *Bare*: the products of top-k resident experts in a loop, with nothing around them.
*Kernels*: the same calls inside the model's decode steps, where caches are cold and threads have slept. *Beyond*: all
else between the call of the experts' module and its answer: routing read back, residency, guesses, gating, the sum.
"""

import argparse
import random
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
from foreroute.model.caches import cache_argument

_KERNELS = ("_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm")


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


def bare(model: Any, loops: int) -> float:
    """Seconds of one layer's products alone: the median over `loops` layers with random resident experts."""
    engine, table = model.foreroute.engine, model.foreroute.table
    views, slot_of = engine.kernels[0].views, engine.pool.residency.slot_of
    maths = views._math
    seconds = []
    for turn in range(loops):
        layer = turn % len(table.layers)
        math = maths[layer]
        experts = random.sample(range(table.layers[layer].num_experts), model.foreroute.plan.top_k[layer])
        operands = [views.operands(layer, slot_of(table.keys.key(layer, expert))) for expert in experts]
        ups = [math.matrix(one, math.up_at) for one in operands]
        downs = [math.matrix(one, math.down_at) for one in operands]
        token = torch.randn(1, model.config.get_text_config().hidden_size).bfloat16()
        inner = torch.randn(1, model.config.get_text_config().moe_intermediate_size).bfloat16()
        kernel = getattr(torch, _KERNELS[ups[0].bits == 8])
        calls = [
            (rows, one.values, one.group, one.scales) if one.bits == 4 else (rows, one.values, one.scales)
            for rows, matrices in ((token, ups), (inner, downs))
            for one in matrices
        ]
        began = time.perf_counter()
        for call in calls:
            kernel(*call)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--packed", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    model = foreroute.load(asked.model, "100%", "bfloat16", config=EngineConfig(packed=str(asked.packed), learn=False))
    fill(model)
    decode(model, asked.tokens)
    engine = model.foreroute.engine
    untimed = engine.compute
    layers = model.foreroute.plan.num_layers
    raw: dict[str, list[float]] = {"bare_us": [], "kernels_us": [], "beyond_us": [], "compute_us": [], "tpot_ms": []}
    before = model.foreroute.stats()
    for _ in range(asked.repeats):
        raw["bare_us"].append(1e6 * bare(model, 60 * layers))
        raw["tpot_ms"].append(1e3 * decode(model, asked.tokens))
        # Without timers in the kernels first: the whole of it.
        engine.compute = compute = Timed(untimed)
        decode(model, asked.tokens)
        raw["compute_us"].append(1e6 * statistics.median(compute.each[layers:]))
        engine.compute = compute = Timed(untimed)
        kernels = {name: Timed(getattr(torch, name)) for name in _KERNELS}
        for name, timed in kernels.items():
            setattr(torch, name, timed)
        try:
            decode(model, asked.tokens)
        finally:
            for name, timed in kernels.items():
                setattr(torch, name, timed.function)
            engine.compute = untimed
        calls = len(compute.each)
        inside = sum(timed.seconds for timed in kernels.values()) / calls
        raw["kernels_us"].append(1e6 * inside)
        raw["beyond_us"].append(1e6 * (compute.seconds / calls - inside))
    stats = model.foreroute.stats().minus(before).decode
    assert stats.misses == 0, "every expert is meant to be resident"
    result = {
        "model": asked.model.name, "packed": asked.packed.name,
        **{name: _harness.summary(values) for name, values in raw.items()},
        "kernels_over_bare": statistics.median(raw["kernels_us"]) / statistics.median(raw["bare_us"]),
    }  # fmt: skip
    model.foreroute.close()
    _harness.record(f"moe-path-{asked.packed.name.removesuffix('.foreroute')}", _harness.rounded(result), raw)


if __name__ == "__main__":
    main()
