"""What fewer bits are worth: one model as stored, in q8_0 and in q4_k, decoding with the same memory, interleaved.

    python -m benchmarks.quant build/synth --memory 1.5GiB [--tokens 24] [--repeats 4]

Stores are packed under --work, where they are missing. Tokens may differ: that is what `foreroute eval --packed q4_k`
prices.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch

from benchmarks import _harness
from foreroute import EngineConfig
from foreroute.checkpoint.codecs import CODECS, STORED
from foreroute.checkpoint.locate import read_index
from foreroute.kernels.ggml.library import open_library
from foreroute.model.build.skeleton import outline
from foreroute.model.caches import cache_argument, cache_of
from foreroute.prepare.pack import pack
from foreroute.prepare.quantise import Quantiser


def store_of(model: Path, codec: str, work: Path) -> Path:
    """The packed store of a codec, made when it is not there."""
    path = work / f"{model.name}.{codec}.foreroute"
    if not path.exists():
        sketch = outline(model, read_index(model))
        quantiser = (
            None
            if codec == STORED
            else Quantiser(sketch.table, CODECS[codec], open_library(), torch.get_num_threads(), measured=0)
        )
        pack(sketch.table, path, progress=lambda done, total: None, quantiser=quantiser)
        print(f"packed {path.name}", flush=True)
    return path


def decode_ms(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Milliseconds per token of greedy decoding, the prompt not counted."""
    with torch.no_grad():
        output = model(prompt, use_cache=True)
        started = time.perf_counter()
        for _ in range(tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, **cache_argument(cache_of(output)), use_cache=True)
    return 1e3 * (time.perf_counter() - started) / tokens


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="1.5GiB")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--codecs", nargs="+", default=[STORED, "q8_0", "q4_k"])
    parser.add_argument("--work", type=Path, default=Path("build"))
    asked = parser.parse_args()
    models: dict[str, Any] = {}
    for codec in asked.codecs:
        store = store_of(asked.model, codec, asked.work)
        models[codec] = foreroute.load(asked.model, asked.memory, config=EngineConfig(packed=str(store)))
        gc.collect()
    generator = torch.Generator().manual_seed(0)
    vocabulary = next(iter(models.values())).config.vocab_size
    prompts = torch.randint(1, vocabulary, (asked.repeats + 1, 1, 16), generator=generator)
    turns = {name: iter(prompts) for name in models}
    before: dict[str, Any] = {}

    def run(name: str) -> float:
        before.setdefault(name, models[name].foreroute.stats())
        return decode_ms(models[name], next(turns[name]), asked.tokens)

    times = _harness.interleave({name: lambda name=name: run(name) for name in models}, asked.repeats)
    found = {}
    for name, model in models.items():
        decode = model.foreroute.stats().minus(before[name]).decode
        plan = model.foreroute.plan
        found[name] = {
            "tpot_ms": _harness.summary(times[name]),
            "resident_share": plan.resident_share,
            "expert_mb": plan.expert_bytes / 1e6,
            "read_mb_per_token": (decode.demand_bytes + decode.prefetch_bytes) / decode.tokens / 1e6,
            "stall_ms_per_token": 1e3 * decode.stall_s / decode.tokens,
            "hit_rate": decode.hit_rate,
        }
        print(name, _harness.rounded(found[name]), flush=True)
        model.foreroute.close()
    first = statistics.median(times[asked.codecs[0]])
    result = {
        "model": asked.model.name, "memory": asked.memory, "codecs": found,
        "faster_than_stored": {name: first / statistics.median(one) for name, one in times.items()},
    }  # fmt: skip
    _harness.record(f"quant-{asked.model.name}", _harness.rounded(result), times)


if __name__ == "__main__":
    main()
