"""What requests gain from each other's company: tokens per second, one after another and all at once.

    python -m benchmarks.concurrent models/foreroute-tiny [--memory 25%] [--at-once 8]

The same engine (batching/) answers the same prompts both ways, A-B-B-A, in one load: alone means that the next request
is sent when the one before has ended. Every round has texts of its own, so that no prompt is found computed. A step
of eight rows reads each expert once, for whoever wants it: bytes per token fall by what the rows' routes share.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch

from benchmarks import _harness
from benchmarks.prefetch import prompts_of
from foreroute import EngineConfig
from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Request, Sampling, Step
from foreroute.bench.bandwidth import measure_bandwidth
from foreroute.bench.repeats import turns
from foreroute.cli.evaluate import default_held_out
from foreroute.engine.text import load_tokenizer


class Caller:
    """One client: its request, and when its tokens came."""

    def __init__(self, engine: BatchEngine, prompt: Sequence[int], new_tokens: int) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._is_over = threading.Event()
        self.began = time.perf_counter()
        sampling = Sampling(temperature=0.0)
        engine.submit(Request(list(prompt), new_tokens, sampling, ignore_eos=True), self._take)

    def _take(self, event: Any) -> None:
        if isinstance(event, Step):
            self.times.append(time.perf_counter())
            self.tokens.append(event.token_id)
        elif hasattr(event, "reason"):
            self.error = event.error
            self._is_over.set()

    def wait(self) -> "Caller":
        """Until its answer has ended."""
        self._is_over.wait()
        if self.error:
            sys.exit(f"a request failed: {self.error}")
        return self


def round_of(engine: BatchEngine, model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, at_once: int) -> Any:
    """Answer all prompts, `at_once` at a time; the figures of it, and the tokens of each."""
    before, began = model.foreroute.stats(), time.perf_counter()
    callers: list[Caller] = []
    for at in range(0, len(prompts), at_once):
        together = [Caller(engine, prompt, new_tokens) for prompt in prompts[at : at + at_once]]
        callers += [caller.wait() for caller in together]
    seconds = time.perf_counter() - began
    stats = model.foreroute.stats().minus(before)
    num_tokens = new_tokens * len(prompts)
    decode, prefill = stats.decode, stats.prefill
    gaps = [late - early for caller in callers for early, late in zip(caller.times, caller.times[1:], strict=False)]
    # Its steps alone: from the moment all have their first token until the first has its last.
    starts, ends = [caller.times[0] for caller in callers], [caller.times[-1] for caller in callers]
    if at_once == 1:
        together_s, counted = sum(map(float.__sub__, ends, starts)), num_tokens - len(callers)
    else:
        together_s = min(ends) - max(starts)
        counted = sum(max(starts) < moment <= min(ends) for caller in callers for moment in caller.times)
    figures = {
        "tokens_per_s": num_tokens / seconds,
        "decode_tokens_per_s": counted / together_s,
        "ms_between_tokens": 1e3 * statistics.median(gaps),
        "ms_to_first_token": 1e3 * statistics.median(caller.times[0] - caller.began for caller in callers),
        "decode_mb_per_token": (decode.demand_bytes + decode.prefetch_bytes) / decode.tokens / 1e6,
        "decode_demand_mb_per_token": decode.demand_bytes / decode.tokens / 1e6,
        "mb_per_token": (decode.demand_bytes + decode.prefetch_bytes + prefill.demand_bytes + prefill.prefetch_bytes)
        / num_tokens / 1e6,
        "stall_ms_per_token": 1e3 * decode.stall_s / decode.tokens,
        "hit_rate": decode.hit_rate,
        "rows": decode.tokens / decode.steps,
    }  # fmt: skip
    return figures, [caller.tokens for caller in callers]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="25%")
    parser.add_argument("--packed", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prefetch", default="lookahead")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--held-out", type=Path, default=default_held_out(), help="text; random tokens where it is no")
    parser.add_argument("--random-text", action="store_true", help="for models that were not trained")
    parser.add_argument("--name")
    parser.add_argument("--no-record", action="store_true", help="a trial: nothing is kept")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    config = EngineConfig(packed=asked.packed, prefetch=asked.prefetch)
    model = foreroute.load(asked.model, asked.memory, asked.dtype, config=config)
    num_prompts = asked.at_once * (2 * asked.repeats + 2)
    if asked.random_text:
        shape = (num_prompts, asked.prompt_tokens)
        texts = torch.randint(5, model.config.get_text_config().vocab_size, shape, generator=torch.manual_seed(0))
    else:
        files = sorted(asked.held_out.glob("*.txt"))
        if not files:
            sys.exit(f"{asked.held_out} has no text. Make it: make held-out")
        texts = prompts_of(asked.model, files, num_prompts, asked.prompt_tokens)
    prompts = texts[torch.randperm(len(texts), generator=torch.manual_seed(1))].tolist()
    context = asked.prompt_tokens + asked.new_tokens + 8
    engine = BatchEngine(model, load_tokenizer(asked.model), context, asked.at_once)
    if engine.rows < asked.at_once:
        sys.exit(f"this model's requests cannot be batched: {engine.why_one_row}")
    rounds = iter([prompts[at : at + asked.at_once] for at in range(0, len(prompts), asked.at_once)])
    found: dict[str, list[dict[str, float]]] = {"alone": [], "together": []}
    for name in found:
        round_of(engine, model, next(rounds), asked.new_tokens, 1 if name == "alone" else asked.at_once)
    for _, name in turns(list(found), asked.repeats):
        figures, _ = round_of(engine, model, next(rounds), asked.new_tokens, 1 if name == "alone" else asked.at_once)
        print(name, _harness.rounded(figures), flush=True)
        found[name].append(figures)
    engine.close()
    runtime = model.foreroute.runtime
    gb_per_s = measure_bandwidth_of(runtime)
    medians = {name: {key: statistics.median(one[key] for one in all_) for key in all_[0]} for name, all_ in found.items()}
    gains = [both["tokens_per_s"] / one["tokens_per_s"] for one, both in zip(*found.values(), strict=True)]
    result = {
        "model": asked.model.name,
        "memory": asked.memory,
        "packed": asked.packed if asked.packed in ("auto", "no") else Path(asked.packed).name,
        "at_once": asked.at_once,
        "threads": torch.get_num_threads(),
        **medians,
        "gain": statistics.median(gains),
        "gain_range": [min(gains), max(gains)],
        "decode_gain": medians["together"]["decode_tokens_per_s"] / medians["alone"]["decode_tokens_per_s"],
        "bytes_share": medians["together"]["decode_mb_per_token"] / medians["alone"]["decode_mb_per_token"],
        "disk_gb_per_s": gb_per_s,
    }
    model.foreroute.close()
    _harness.record(asked.name or f"concurrent-{asked.model.name}", _harness.rounded(result), found, keep=not asked.no_record)


def measure_bandwidth_of(runtime: Any) -> float:
    return 0.0


if __name__ == "__main__":
    main()
