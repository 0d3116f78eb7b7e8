"""What each part of the engine is worth: the ablation ladder on one model and budget.

    python -m benchmarks.ladder MODEL [--memory 25%] [--tokens 48] [--repeats 3] [--prompt TEXT]

Rungs: on-demand (every expert read when it is routed to) / + cache / + hits first / + prefetch. Every rung decodes the
same prompt, interleaved; their tokens must be equal, or the benchmark fails. Hit rates mean something on trained models
only; on random weights this measures mechanics.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks import _harness
from benchmarks.overhead import decode
from foreroute import EngineConfig
from foreroute.engine.loader import load

LADDER = {
    "on-demand": EngineConfig(cache=False, hits_first=False, prefetch="none"),
    "+ cache": EngineConfig(hits_first=False, prefetch="none"),
    "+ hits first": EngineConfig(prefetch="none"),
    "+ prefetch": EngineConfig(),
}


def main() -> None:
    """Climb the ladder and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="25%")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", default="The river that flows through the town is called")
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    prompt = tokenizer(asked.prompt, return_tensors="pt").input_ids
    rungs = {name: _Rung(asked.model, asked.memory, config, prompt, asked.tokens) for name, config in LADDER.items()}
    tpot_ms = _harness.interleave({name: rung.decode_ms for name, rung in rungs.items()}, asked.repeats)
    first = next(iter(rungs.values())).tokens
    different = [name for name, rung in rungs.items() if rung.tokens != first]
    result = {
        "model": asked.model.name,
        "memory": asked.memory,
        "same_tokens_on_every_rung": not different,
        "rungs": {
            name: {"tpot_ms": _harness.summary(tpot_ms[name]), **rung.per_token()} for name, rung in rungs.items()
        },
        "gain_over_the_rung_below": {
            name: statistics.median(tpot_ms[below]) / statistics.median(tpot_ms[name])
            for below, name in itertools.pairwise(rungs)
        },
    }
    _harness.record(f"ladder-{asked.model.name}", _harness.rounded(result), {"tpot_ms": tpot_ms})
    if different:
        sys.exit(f"tokens differ on {different}: nothing above is worth reading")


class _Rung:
    """One configuration of the engine, loaded; it stays loaded, so that its cache is warm when it is measured."""

    def __init__(self, folder: Path, memory: str, config: EngineConfig, prompt: torch.Tensor, tokens: int) -> None:
        self._model: Any = load(folder, memory, config=config)
        self._decode: Callable[[], tuple[float, list[int]]] = lambda: decode(self._model, prompt, tokens)
        self._before = self._model.foreroute.stats()
        self.tokens: list[int] = []

    def decode_ms(self) -> float:
        """TPOT of one run, in ms."""
        self._before = self._model.foreroute.stats()
        tpot_s, self.tokens = self._decode()
        return 1e3 * tpot_s

    def per_token(self) -> dict[str, float]:
        """What the last run's decode steps did, per token."""
        stats = self._model.foreroute.stats().minus(self._before)
        steps = stats.decode.steps
        return {
            "hit_rate": stats.decode.hit_rate,
            "late": stats.decode.late / steps,
            "misses": stats.decode.misses / steps,
            "demand_mb": stats.decode.demand_bytes / steps / 1e6,
            "prefetch_mb": stats.decode.prefetch_bytes / steps / 1e6,
            "stall_ms": 1e3 * stats.decode.stall_s / steps,
            "prefetch_used": stats.decode.prefetch_used / steps,
            "evictions": stats.evictions / steps,
        }


if __name__ == "__main__":
    main()
