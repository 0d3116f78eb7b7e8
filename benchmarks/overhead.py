"""What foreroute costs when nothing has to be fetched: every expert resident, against transformers itself.

    python -m benchmarks.overhead MODEL [--tokens 24] [--repeats 5]

Both models are in memory at once and decode the same prompt in turn (A-B-B-A); transformers runs each of its experts
implementations first and competes with the fastest. A second run of foreroute under cProfile says where its own time
goes: Python of this package and the calls it makes, apart from the maths (kernels) and from waiting.
"""

import argparse
import cProfile
import itertools
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks import _harness

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
# Calls that are the experts' maths itself; transformers has them too.
KERNELS = ("torch.mm", "silu", "linear", "index_add_", "torch._C._nn", "'mul'", "__mul__", "method 'add_'")


class _Clock(BaseStreamer):
    """Notes when each token was handed out, and says so when the first one has been."""

    def __init__(self, on_first_token: Callable[[], None] = lambda: None) -> None:
        self.times: list[float] = []
        self._on_first_token = on_first_token

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 2:  # the first put is the prompt
            self._on_first_token()

    def end(self) -> None:
        pass

    def tpot_s(self) -> float:
        """Median time between tokens; the first put is the prompt, the second ends the prefill."""
        decode = self.times[1:]
        return statistics.median(later - earlier for earlier, later in itertools.pairwise(decode))


def decode(
    model: Any, prompt: torch.Tensor, num_tokens: int, on_first_token: Callable[[], None] = lambda: None
) -> tuple[float, list[int]]:
    """Greedy decode; returns the TPOT in seconds and the tokens."""
    clock = _Clock(on_first_token)
    out = model.generate(
        prompt, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, streamer=clock
    )
    return clock.tpot_s(), out[0, prompt.shape[1] :].tolist()


def fastest_implementation(model: Any, prompt: torch.Tensor, num_tokens: int) -> tuple[str, dict[str, float]]:
    """transformers' experts implementations by TPOT in ms, and the name of the best."""
    tpot_ms = {}
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        decode(model, prompt, 4)
        tpot_ms[name] = 1e3 * decode(model, prompt, num_tokens)[0]
        print(f"transformers {name}: {tpot_ms[name]:.1f} ms/token")
    best = min(tpot_ms, key=lambda name: tpot_ms[name])
    model.set_experts_implementation(best)
    return best, tpot_ms


def own_time_share(model: Any, prompt: torch.Tensor, num_tokens: int) -> dict[str, float]:
    """Share of decode time in this package's own code, in its kernels and in its waits.

    The profiler charges Python more than it costs, so the own share is an upper bound.
    """
    profile = cProfile.Profile()
    started = 0.0

    def start() -> None:
        nonlocal started
        started = time.perf_counter()
        profile.enable()

    decode(model, prompt, num_tokens, start)
    profile.disable()
    wall_s = time.perf_counter() - started
    seconds = {"own": 0.0, "kernel": 0.0, "wait": 0.0}
    for (file, _, name), (_, _, tottime, _, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if _is_ours(file):
            seconds["own"] += tottime
            continue
        kind = "own"
        if "SimpleQueue" in name or "lock" in name:
            kind = "wait"
        elif any(kernel in name for kernel in KERNELS):
            kind = "kernel"
        seconds[kind] += sum(entry[2] for caller, entry in callers.items() if _is_ours(caller[0]))
    return {f"{kind}_share": value / wall_s for kind, value in seconds.items()}


def _is_ours(file: str) -> bool:
    return "/foreroute/" in file.replace("\\", "/") and "benchmarks" not in file


def main() -> None:
    """Compete with transformers on a model that is wholly resident, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint that fits memory twice (benchmarks/make_synthetic.py makes one)")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    reference = AutoModelForCausalLM.from_pretrained(asked.model).eval()
    model = foreroute.load(asked.model, memory="100%")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, reference.config.vocab_size, (1, 512), generator=generator)
    best, by_implementation = fastest_implementation(reference, prompt[:, :32], asked.tokens)
    model(prompt)  # a long random prompt routes to every expert: all are read now
    plan, before = model.foreroute.plan, model.foreroute.stats()
    ours_tokens = decode(model, prompt[:, :32], asked.tokens)[1]
    theirs_tokens = decode(reference, prompt[:, :32], asked.tokens)[1]
    figures = _harness.interleave(
        {
            "foreroute": lambda: 1e3 * decode(model, prompt[:, :32], asked.tokens)[0],
            "transformers": lambda: 1e3 * decode(reference, prompt[:, :32], asked.tokens)[0],
        },
        asked.repeats,
    )
    shares = own_time_share(model, prompt[:, :32], asked.tokens)
    loads = model.foreroute.stats().minus(before).decode
    ratios = [ours / theirs for ours, theirs in zip(figures["foreroute"], figures["transformers"], strict=True)]
    result = {
        "model": {"layers": plan.num_layers, "experts": plan.num_experts, "expert_bytes": plan.expert_bytes},
        "threads": asked.threads,
        "transformers_implementation": best,
        "transformers_tpot_ms": by_implementation,
        "tpot_ms": {name: _harness.summary(times) for name, times in figures.items()},
        "ratio": _harness.summary(ratios),
        "profile": shares,
        "experts_read_while_measuring": loads.demand_loads + loads.prefetch_loads,
        "same_greedy_tokens_as_that_implementation": ours_tokens == theirs_tokens,
    }
    _harness.record("overhead", _harness.rounded(result), {"tpot_ms": figures, "ratios": ratios})


if __name__ == "__main__":
    main()
