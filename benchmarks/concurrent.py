"""What requests gain from each other's company: tokens per second, one after another and all at once.

    python -m benchmarks.concurrent models/foreroute-tiny [--memory 25%] [--at-once 8]
    python -m benchmarks.concurrent build/synth128 --packed build/synth128.q4_k.foreroute --random-text --trace TRACE

The same engine (batching/) answers the same number of prompts both ways, A-B-B-A, in one load: alone means that the
next request is sent when the one before has ended. Every round has texts of its own, so that no prompt is found
computed. A step of eight rows reads each expert once, for whoever wants it: bytes per token fall by what routes share.

A large model of random weights knows no routes. With --trace (benchmarks/record_traces.py, 128 passages) each request
decodes under routes of a trained model, and with its guesses, as in benchmarks/replayed_routes.py; prompts, which use
nearly every expert, keep the model's own.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch

from benchmarks import _harness
from benchmarks.prefetch import prompts_of
from benchmarks.replayed_routes import layer_of, read_steps
from foreroute import EngineConfig
from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Finished, NewToken, Request, Sampling
from foreroute.bench.bandwidth import measure_bandwidth
from foreroute.bench.repeats import turns
from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.records import open_store
from foreroute.cli.commands.evaluate import default_held_out
from foreroute.model.build.skeleton import outline
from foreroute.model.text import load_tokenizer

ALONE, TOGETHER = "alone", "together"


class Caller:
    """One client: its request, and when its tokens came."""

    def __init__(self, engine: BatchEngine, prompt: Sequence[int], new_tokens: int) -> None:
        self.times: list[float] = []
        self._error: str | None = None
        self._is_over = threading.Event()
        self.began = time.perf_counter()
        engine.submit(Request(list(prompt), new_tokens, Sampling(temperature=0.0), ignore_eos=True), self._take)

    def _take(self, event: Any) -> None:
        if isinstance(event, NewToken):
            self.times.append(time.perf_counter())
        elif isinstance(event, Finished):
            self._error = event.error
            self._is_over.set()

    def wait(self) -> "Caller":
        """Until its answer has ended."""
        self._is_over.wait()
        if self._error:
            sys.exit(f"a request failed: {self._error}")
        return self


class TrainedRoutes:
    """A trained model's routes and guesses, for each request those of passages of its own."""

    def __init__(self, trace: Path, model: Any) -> None:
        self._num_experts, self._passages = read_steps(trace)
        self._length = min(map(len, self._passages))
        self._engine: BatchEngine | None = None
        self._turns: dict[int, int] = {}
        engine = model.foreroute.engine
        engine.prefetcher.predictor = self
        for layer in model.foreroute.layers:
            layer.experts.engine_forward = self._with_routes(layer.index, layer.experts.engine_forward, engine)

    def attach(self, engine: BatchEngine) -> None:
        """The engine whose rows decode."""
        self._engine = engine

    def _with_routes(self, layer: int, forward: Callable[..., torch.Tensor], engine: Any) -> Callable[..., Any]:
        def routed(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            if not engine.is_prefill:
                ids = torch.tensor([experts for experts, _ in self._rows(layer)])
            return forward(hidden, ids, weights)

        return routed

    def _rows(self, layer: int) -> list[tuple[list[int], list[int]]]:
        """(routed, guessed) of every row that decodes."""
        assert self._engine is not None, "it was attached"
        found = []
        for answer in self._engine._steps.running:
            turn = self._turns.setdefault(id(answer.request), len(self._turns))
            at = (len(answer.ids) - len(answer.request.prompt_ids)) % self._length
            found.append(layer_of(self._passages, self._num_experts, layer, turn, at))
        return found

    # What the engine asks of a predictor.

    def guess(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Sequence[int]:
        """Of the layer after `layer`, the most wanted first."""
        return self._most_wanted(layer + 1)

    def guess_first(self, token_ids: torch.Tensor, num_rows: int | None = None) -> Sequence[int]:
        """Of layer 0."""
        return self._most_wanted(0)

    def see_first(self, hidden: torch.Tensor, num_rows: int, *, goes_on: bool = False) -> None:
        """The routes are known."""

    def drop_last(self, count: int) -> None:
        """No token is drafted here."""

    def _most_wanted(self, layer: int) -> list[int]:
        votes: dict[int, int] = {}
        for _, guessed in self._rows(layer):
            for rank, expert in enumerate(guessed):
                votes[expert] = votes.get(expert, 0) + len(guessed) - rank
        return sorted(votes, key=lambda expert: -votes[expert])


class Bench:
    """A loaded model, its engine, and the prompts that are left."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        config = EngineConfig(packed=asked.packed)
        self.model: Any = foreroute.load(asked.model, asked.memory, asked.dtype, config=config)
        routes = None if asked.trace is None else TrainedRoutes(asked.trace, self.model)
        self._prompts = iter(self._texts(asked.at_once * 2 * (asked.repeats + 1)))
        context = asked.prompt_tokens + asked.new_tokens + 8
        self.engine = BatchEngine(self.model, load_tokenizer(asked.model), context, asked.at_once)
        if self.engine.rows < asked.at_once:
            sys.exit(f"this model's requests cannot be batched: {self.engine.why_one_row}")
        if routes is not None:
            routes.attach(self.engine)

    def _texts(self, count: int) -> list[list[int]]:
        asked, draw = self.asked, torch.Generator().manual_seed(0)
        if asked.random_text:
            size = self.model.config.get_text_config().vocab_size
            found: list[list[int]] = torch.randint(5, size, (count, asked.prompt_tokens), generator=draw).tolist()
            return found
        files = sorted(asked.held_out.glob("*.txt"))
        if not files:
            sys.exit(f"{asked.held_out} has no text. Make it: make held-out")
        texts = prompts_of(asked.model, files, count, asked.prompt_tokens)
        found = texts[torch.randperm(len(texts), generator=draw)].tolist()
        return found

    def round(self, name: str) -> dict[str, float]:
        """Answer the next prompts; the figures of it."""
        asked, at_once = self.asked, self.asked.at_once if name == TOGETHER else 1
        prompts = [next(self._prompts) for _ in range(asked.at_once)]
        before, began = self.model.foreroute.stats(), time.perf_counter()
        callers: list[Caller] = []
        for at in range(0, len(prompts), at_once):
            sent = [Caller(self.engine, prompt, asked.new_tokens) for prompt in prompts[at : at + at_once]]
            callers += [caller.wait() for caller in sent]
        seconds = time.perf_counter() - began
        stats = self.model.foreroute.stats().minus(before)
        decode, prefill, num_tokens = stats.decode, stats.prefill, asked.new_tokens * len(prompts)
        gaps = [late - early for one in callers for early, late in zip(one.times, one.times[1:], strict=False)]
        decoded = decode.demand_bytes + decode.prefetch_bytes
        return {
            "tokens_per_s": num_tokens / seconds,
            "ms_between_tokens": 1e3 * statistics.median(gaps),
            "ms_to_first_token": 1e3 * statistics.median(one.times[0] - one.began for one in callers),
            "mb_per_token": (decoded + prefill.demand_bytes + prefill.prefetch_bytes) / num_tokens / 1e6,
            "decode_mb_per_token": decoded / decode.tokens / 1e6,
            "decode_demand_mb_per_token": decode.demand_bytes / decode.tokens / 1e6,
            "decode_stall_ms_per_token": 1e3 * decode.stall_s / decode.tokens,
            "hit_rate": decode.hit_rate,
            "rows": decode.tokens / decode.steps,
            "read_mb_per_s": stats.read_bytes / seconds / 1e6,
        }

    def disk_mb_per_s(self) -> float:
        """The experts in random order, read by the engine's own reader with nothing else to do."""
        asked = self.asked
        table = outline(asked.model, read_index(asked.model)).table
        store = open_store(asked.model, asked.packed, table)
        table = table if store is None else store.table
        reads_of = table.reads if store is None else store.reads_of(table)
        keys = range(len(table.layers) * table.num_experts)
        return measure_bandwidth(reads_of, keys, table.slot_bytes).bytes_per_s / 1e6


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="25%")
    parser.add_argument("--packed", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=4, help="rounds each, behind one that warms up")
    parser.add_argument("--threads", type=int, help="torch's; small models want 1")
    parser.add_argument("--held-out", type=Path, default=default_held_out(), help="a folder of texts for prompts")
    parser.add_argument("--random-text", action="store_true", help="for models that were not trained")
    parser.add_argument("--trace", type=Path, help="routes of a trained model, for one of random weights")
    parser.add_argument("--name")
    parser.add_argument("--no-record", action="store_true", help="a trial: nothing is kept")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    bench = Bench(asked)
    found: dict[str, list[dict[str, float]]] = {ALONE: [], TOGETHER: []}
    for name in found:
        bench.round(name)
    disk = [bench.disk_mb_per_s()]
    for _, name in turns(list(found), asked.repeats):
        figures = bench.round(name)
        print(name, _harness.rounded(figures), flush=True)
        found[name].append(figures)
    disk.append(bench.disk_mb_per_s())
    bench.engine.close()
    medians = {
        name: {key: statistics.median(one[key] for one in all_) for key in all_[0]} for name, all_ in found.items()
    }
    gains = [
        both["tokens_per_s"] / one["tokens_per_s"] for one, both in zip(found[ALONE], found[TOGETHER], strict=True)
    ]
    result = {
        "model": asked.model.name,
        "memory": asked.memory,
        "num_slots": bench.model.foreroute.plan.num_slots,
        "stored": bench.model.foreroute.plan.stored_dtype,
        "trace": None if asked.trace is None else asked.trace.name,
        "at_once": asked.at_once,
        "threads": torch.get_num_threads(),
        **medians,
        "gain": statistics.median(gains),
        "gain_range": [min(gains), max(gains)],
        "mb_per_token_share": medians[TOGETHER]["mb_per_token"] / medians[ALONE]["mb_per_token"],
        "disk_mb_per_s": disk,
    }
    bench.model.foreroute.close()
    name = asked.name or f"concurrent-{asked.model.name}"
    _harness.record(name, _harness.rounded(result), found, keep=not asked.no_record)


if __name__ == "__main__":
    main()
