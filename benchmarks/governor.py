"""What the governor costs and gains: decoding without guesses, with all of them, and governed, in turns on one machine.

    python -m benchmarks.governor models/foreroute-tiny --memory 25% [--tokens 128] [--repeats 10]

All three are loaded at once and stay loaded: a pool is warm, and a governor remembers. Its trials are in its times.
Tokens are compared before any time is believed.
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
from foreroute.model.caches import cache_argument, cache_of

CONFIGS: dict[str, dict[str, Any]] = {
    "off": {"prefetch": "none"},
    "always": {"governor": False},
    "governed": {},
}


def decode(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[float, list[int]]:
    """Milliseconds per token of greedy decoding after the prompt, and the tokens."""
    chosen: list[int] = []
    with torch.inference_mode():
        output = model(prompt, use_cache=True)
        began = time.perf_counter()
        for _ in range(tokens):
            token = output.logits[:, -1:].argmax(-1)
            chosen.append(int(token))
            output = model(token, **cache_argument(cache_of(output)), use_cache=True)
    return 1e3 * (time.perf_counter() - began) / tokens, chosen


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="25%")
    parser.add_argument("--packed", default="auto")
    parser.add_argument("--predictor", default="auto")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=10)
    asked = parser.parse_args()
    shared = {"packed": asked.packed, "predictor": asked.predictor}
    models = {
        name: foreroute.load(asked.model, asked.memory, "bfloat16", config=EngineConfig(**shared, **config))
        for name, config in CONFIGS.items()
    }
    vocabulary = models["off"].config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, min(vocabulary, 2000), (asked.repeats + 1, 1, 24), generator=generator)
    turns = {name: iter(prompts) for name in models}
    tokens: dict[str, list[list[int]]] = {name: [] for name in models}

    def run(name: str) -> float:
        ms, chosen = decode(models[name], next(turns[name]), asked.tokens)
        tokens[name].append(chosen)
        return ms

    times = _harness.interleave({name: lambda name=name: run(name) for name in models}, asked.repeats)
    if any(tokens[name] != tokens["off"] for name in models):
        sys.exit("the tokens differ: nothing above is worth reading")
    governor = models["governed"].foreroute.governor
    off = times["off"]
    over_off = {name: statistics.median(map(float.__truediv__, one, off)) for name, one in times.items()}
    result = {
        "model": asked.model.name,
        "memory": asked.memory,
        "tokens": asked.tokens,
        "tpot_ms": {name: _harness.summary(one) for name, one in times.items()},
        "over_off": over_off,
        "chosen": governor.chosen,
        "why": governor.why,
    }
    for model in models.values():
        model.foreroute.close()
    _harness.record(f"governor-{asked.model.name}", _harness.rounded(result), times)


if __name__ == "__main__":
    main()
