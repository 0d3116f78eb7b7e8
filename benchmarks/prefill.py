"""Whether guesses help a prompt: time to the first token with and without them, interleaved.

    python -m benchmarks.prefill build/synth --memory 1.5GiB [--prompts 32 128 512] [--repeats 5]

Each run starts with the pool as the run before left it, as a server's would be; experts are read past the page cache.
Both give the same logits, or the benchmark fails.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch

from benchmarks import _harness
from foreroute import EngineConfig


def main() -> None:
    """Time prefill both ways, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="1.5GiB")
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--predictor", default="no")
    parser.add_argument("--auto", action="store_true", help="guesses where the engine would choose them, not always")
    asked = parser.parse_args()
    models = {
        name: foreroute.load(
            asked.model,
            asked.memory,
            config=EngineConfig(prefetch_prefill=on, predictor=asked.predictor),
        )
        for name, on in (("without", "off"), ("with", "auto" if asked.auto else "on"))
    }
    generator = torch.Generator().manual_seed(0)
    found, raw, is_same = {}, {}, True
    for length in asked.prompts:
        vocabulary = models["with"].config.vocab_size
        prompts = torch.randint(1, vocabulary, (asked.repeats + 1, 1, length), generator=generator)
        turns = {name: iter(prompts) for name in models}
        last: dict[str, torch.Tensor] = {}

        def run(name: str, turns: Any = turns, last: dict[str, torch.Tensor] = last) -> float:
            prompt = next(turns[name])
            started = time.perf_counter()
            last[name] = models[name](prompt, use_cache=False, logits_to_keep=1).logits
            return 1e3 * (time.perf_counter() - started)

        before = {name: model.foreroute.stats() for name, model in models.items()}
        times = _harness.interleave({name: lambda name=name: run(name) for name in models}, asked.repeats)
        is_same &= torch.equal(last["with"], last["without"])
        ratios = [one / other for one, other in zip(times["with"], times["without"], strict=True)]
        stats = {name: model.foreroute.stats().minus(before[name]).prefill for name, model in models.items()}
        found[str(length)] = {
            "ms": {name: _harness.summary(one) for name, one in times.items()},
            "ratio": statistics.median(ratios),
            "stall_s": {name: one.stall_s for name, one in stats.items()},
            "read_mb": {name: (one.demand_bytes + one.prefetch_bytes) / 1e6 for name, one in stats.items()},
            "prefetch_mb": stats["with"].prefetch_bytes / 1e6,
        }
        raw[str(length)] = times
        print(length, _harness.rounded(found[str(length)]), flush=True)
    for model in models.values():
        model.foreroute.close()
    result = {"model": asked.model.name, "memory": asked.memory, "same_logits": is_same, "prompts": found}
    _harness.record(f"prefill-{asked.model.name}", _harness.rounded(result), raw)
    if not is_same:
        sys.exit("logits differ")


if __name__ == "__main__":
    main()
