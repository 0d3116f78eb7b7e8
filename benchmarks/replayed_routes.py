"""A large model's experts paged under a trained model's routes: bytes against Belady's, time against the bound.

    python -m benchmarks.record_traces models/foreroute-tiny --memory 25% --text ... --out build/traces      # once
    python -m benchmarks.replayed_routes build/synth128 --packed build/synth128.q4_k.foreroute \
        --trace build/traces/foreroute-tiny-25.jsonl --memory 25% 50%

The model has random weights and the shape of Qwen3-30B-A3B's experts (benchmarks/make_synthetic.py): its own router
says nothing about real ones. So its routes are replaced by those of a trained model that has fewer experts. Each of
its layers takes four passages of the trace at once, a quarter of its experts each, and the best two experts of each
passage: 4 x 32 experts, 4 x 2 chosen. How often an expert comes back, and how unevenly they are used, is the trained
model's; so are the guesses, recorded in the trace with their errors. What is measured is the engine: bytes, and time.

Per budget, rungs in turns (A-B-B-A), each loaded for itself so that all have the same memory: on demand, + cache, +
hits first, + prefetch (the trained model's guesses), a guess that is always right, and everything in memory. The
bound of a rung is max(bytes / bandwidth of the disk, compute), measured in the same run: the store read past the page
cache by one thread, and the resident rung.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch
from transformers import DynamicCache

from benchmarks import _harness
from benchmarks.moe_path import fill
from foreroute import EngineConfig
from foreroute.bench.bandwidth import measure_bandwidth
from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.records import open_store
from foreroute.model.build.skeleton import outline
from foreroute.model.caches import cache_argument
from foreroute.residency.belady import belady_misses

STREAMS, TAKEN = 4, 2
RUNGS: dict[str, dict[str, Any]] = {
    "on demand": {"cache": False, "prefetch": "none", "hits_first": False},
    "cache": {"prefetch": "none", "hits_first": False},
    "+ hits first": {"prefetch": "none"},
    "+ prefetch, always": {"governor": False},
    "+ governor": {},
    "oracle prefetch": {"governor": False},
    "resident": {"prefetch": "none"},
}
RESIDENT = "resident"


@dataclasses.dataclass(frozen=True)
class Step:
    """One decode step of the trace: per layer the experts routed to, and those guessed, best first."""

    routes: list[list[int]]
    guesses: list[list[int]]


def read_steps(trace: Path) -> tuple[int, list[list[Step]]]:
    """Experts per layer, and the decode steps of each passage."""
    passages: list[list[Step]] = []
    guessed: dict[int, list[int]] = {}
    routes: list[list[int]] = []
    with trace.open(encoding="utf-8") as lines:
        header = json.loads(next(lines))
        num_layers, num_experts = len(header["experts_per_layer"]), header["experts_per_layer"][0]
        for line in lines:
            event = json.loads(line)
            if event["event"] == "step" and event["phase"] == "prefill" and event["is_start"]:
                passages.append([])
            elif event["event"] == "guess":
                guessed[event["layer"]] = event["experts"]
            elif event["event"] == "layer" and "ids" in event:
                weights = event["weights"][0]
                order = sorted(range(len(weights)), key=lambda at: -weights[at])
                routes.append([event["ids"][0][at] for at in order])
                if len(routes) == num_layers:
                    passages[-1].append(Step(routes, [guessed.get(layer, []) for layer in range(num_layers)]))
                    routes, guessed = [], {}
    return num_experts, [passage for passage in passages if passage]


def layer_of(
    passages: Sequence[Sequence[Step]], num_experts: int, layer: int, turn: int, at: int
) -> tuple[list[int], list[int]]:
    """(routed, guessed) of a large model's layer: four passages at once, others for each turn, at their step `at`.

    Layers that share a trained layer read other passages.
    """
    copy, trained = divmod(layer, len(passages[0][0].routes))
    routed: list[int] = []
    guessed: list[int] = []
    for stream in range(STREAMS):
        step = passages[(stream + (turn + copy) * STREAMS) % len(passages)][at]
        routed += [stream * num_experts + expert for expert in step.routes[trained][:TAKEN]]
        guessed += [stream * num_experts + expert for expert in step.guesses[trained][:TAKEN]]
    return routed, guessed


class Replay:
    """Routes and guesses of a model with `num_layers` layers, step by step; endless, the same for every rung."""

    def __init__(self, num_experts: int, passages: Sequence[Sequence[Step]], num_layers: int, is_oracle: bool) -> None:
        self._num_experts, self._passages, self._num_layers = num_experts, passages, num_layers
        self._is_oracle = is_oracle
        self._steps = self._all()
        self.at = -1
        self.advance()

    def _all(self) -> Iterator[list[tuple[list[int], list[int]]]]:
        """Per step and layer: (routed, guessed). Layers that share a trained layer read other passages."""
        length = min(len(passage) for passage in self._passages)
        turn = 0
        while True:
            for at in range(length):
                found = [layer_of(self._passages, self._num_experts, n, turn, at) for n in range(self._num_layers)]
                yield [(routed, routed if self._is_oracle else guessed) for routed, guessed in found]
            turn += 1

    def advance(self) -> None:
        """The next step."""
        self.now = next(self._steps)
        self.at += 1

    # What the engine asks of a predictor.

    def guess(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Sequence[int]:
        """Of the layer after `layer`."""
        return self.now[layer + 1][1]

    def guess_first(self, token_ids: torch.Tensor, num_rows: int | None = None) -> Sequence[int]:
        """Of layer 0."""
        return self.now[0][1]

    def see_first(self, hidden: torch.Tensor, num_rows: int, *, goes_on: bool = False) -> None:
        """The routes are known."""

    def drop_last(self, count: int) -> None:
        """No token is drafted here."""


class Rung:
    """One configuration, loaded, under the replayed routes."""

    def __init__(self, asked: argparse.Namespace, memory: str, config: dict[str, Any], replay: Replay) -> None:
        config = {"packed": str(asked.packed), "eviction": asked.eviction, **config}
        self.model: Any = foreroute.load(asked.model, memory, "bfloat16", config=EngineConfig(**config))
        self.replay = replay
        prefetcher = self.model.foreroute.engine.prefetcher
        if prefetcher.predictor is not None:
            prefetcher.predictor = replay
        for layer in self.model.foreroute.layers:
            layer.experts.engine_forward = self._with_route(layer.index, layer.experts.engine_forward)

    def _with_route(self, layer: int, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def routed(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return forward(hidden, torch.tensor([self.replay.now[layer][0]]), weights)

        return routed

    def run(self, cache: Any, steps: int) -> tuple[list[float], Any]:
        """Seconds of each of `steps` decode steps, and the engine's counts over them."""
        before, seconds = self.model.foreroute.stats(), []
        token = torch.tensor([[7]])
        with torch.inference_mode():
            for _ in range(steps):
                began = time.perf_counter()
                self.model(token, **cache_argument(cache), use_cache=True)
                seconds.append(time.perf_counter() - began)
                self.replay.advance()
        return seconds, self.model.foreroute.stats().minus(before)


class Bench:
    """The traces, the store, and what was measured so far."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.trace = read_steps(asked.trace)
        sketch = outline(asked.model, read_index(asked.model))
        store = open_store(asked.model, str(asked.packed), sketch.table)
        assert store is not None, "a packed store is given"
        self.table = store.table
        self._reads_of = store.reads_of(store.table)
        self.num_layers = len(store.table.layers)
        self.expert_bytes = store.table.layers[0].layout.nbytes

    def bandwidth(self) -> float:
        """GB/s of the store's experts in random order, read by the engine's own readers with nothing else to do."""
        keys = range(self.num_layers * self.table.num_experts)
        measured = measure_bandwidth(self._reads_of, keys, self.table.slot_bytes, seconds=1.5)
        return measured.bytes_per_s / 1e9

    def run(self, name: str, memory: str) -> dict[str, float]:
        """One rung, loaded, warmed up and measured."""
        asked = self.asked
        replay = Replay(*self.trace, self.num_layers, is_oracle="oracle" in name)
        rung = Rung(asked, memory, RUNGS[name], replay)
        if name == RESIDENT:
            fill(rung.model)
        cache = DynamicCache()
        rung.run(cache, asked.warm_up)
        before = self.bandwidth()
        seconds, stats = rung.run(cache, asked.steps)
        decode, plan = stats.decode, rung.model.foreroute.plan
        found = {
            "tpot_ms": 1e3 * statistics.mean(seconds),
            "tpot_ms_median": 1e3 * statistics.median(seconds),
            "read_mb_per_token": (decode.demand_bytes + decode.prefetch_bytes) / decode.tokens / 1e6,
            "demand_mb_per_token": decode.demand_bytes / decode.tokens / 1e6,
            "stall_ms_per_token": 1e3 * decode.stall_s / decode.tokens,
            "hit_rate": decode.hit_rate,
            "disk_gb_per_s": (before + self.bandwidth()) / 2,
            "num_slots": plan.num_slots,
        }
        rung.model.foreroute.close()
        print(memory, name, _harness.rounded(found), flush=True)
        gc.collect()
        return found

    def belady_mb(self, num_slots: int) -> float:
        """MB per token that no eviction can go below, over the same steps after the same warm-up."""
        replay = Replay(*self.trace, self.num_layers, is_oracle=False)
        width, demands = STREAMS * self.trace[0], []
        for _ in range(self.asked.warm_up + self.asked.steps):
            demands += [[layer * width + expert for expert in routed] for layer, (routed, _) in enumerate(replay.now)]
            replay.advance()
        misses = belady_misses(demands, num_slots)[self.asked.warm_up * self.num_layers :]
        return sum(map(len, misses)) * self.expert_bytes / self.asked.steps / 1e6


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--packed", type=Path, required=True)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--memory", nargs="+", default=["25%", "50%"])
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), choices=list(RUNGS))
    parser.add_argument("--eviction", default="lfu")
    parser.add_argument("--warm-up", type=int, default=60)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", default="replayed-routes")
    asked = parser.parse_args()
    bench = Bench(asked)
    raw: dict[str, list[dict[str, float]]] = {RESIDENT: [bench.run(RESIDENT, "100%")]}
    result: dict[str, Any] = {"model": asked.model.name, "trace": asked.trace.name, "eviction": asked.eviction}
    for memory in asked.memory:
        rungs = [name for name in asked.rungs if name != RESIDENT]
        for turn in range(asked.rounds):
            for name in rungs if turn % 2 == 0 else reversed(rungs):
                raw.setdefault(f"{memory} {name}", []).append(bench.run(name, memory))
        result[memory] = {name: told(raw[f"{memory} {name}"], raw[RESIDENT], bench) for name in rungs}
        for name, rung in result[memory].items():
            print(f"{memory:5} {name:18}", " ".join(f"{key} {value:.3g}" for key, value in rung.items()), flush=True)
    raw[RESIDENT].append(bench.run(RESIDENT, "100%"))
    result[RESIDENT] = mean_of(raw[RESIDENT])
    _harness.record(asked.name, _harness.rounded(result), raw)


def mean_of(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The runs' mean, figure by figure."""
    return {name: statistics.mean(run[name] for run in runs) for name in runs[0]}


def told(runs: Sequence[dict[str, float]], resident: Sequence[dict[str, float]], bench: Bench) -> dict[str, float]:
    """A rung's figures beside the bounds."""
    rung = mean_of(runs)
    compute_ms = statistics.mean(run["tpot_ms_median"] for run in resident)
    disk_ms = rung["read_mb_per_token"] / rung["disk_gb_per_s"]
    belady = bench.belady_mb(int(rung["num_slots"]))
    bound_ms = max(disk_ms, compute_ms)
    return {
        **rung, "compute_ms": compute_ms, "disk_ms": disk_ms, "over_bound": rung["tpot_ms"] / bound_ms,
        "belady_mb_per_token": belady, "over_belady": rung["read_mb_per_token"] / belady,
    }  # fmt: skip


if __name__ == "__main__":
    main()
