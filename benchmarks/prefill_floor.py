"""How near does a prompt come to what disk and processor allow? Its time beside both floors, measured in the same run.

    python -m benchmarks.prefill_floor build/synth [--packed build/synth.q4_k.foreroute] [--memory 25%] [--tokens 512]

In turns (A-B-B-A), a new random prompt per round for all: foreroute from an empty pool (cold) and from what the
prompt before left (warm); the same prompt with every expert in memory, which is the compute floor; and a bare loop of
O_DIRECT reads of the same files, whose rate makes the disk floor of the bytes that were read. An expert that is read
twice, or in vain, shows as more than 1 in `read_of_distinct`. Wanted: at least 0.8 of the larger floor.
"""

import argparse
import mmap
import os
import random
import time
from pathlib import Path
from typing import Any

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch

from benchmarks import _harness
from foreroute import EngineConfig

BLOCK_BYTES = 4 * 2**20
BLOCKS_PER_RUN = 200


class BareReads:
    """Whole blocks of the files with the experts, in random order, past the page cache."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
        sizes = [path.stat().st_size // BLOCK_BYTES for path in paths]
        blocks = [(file, block) for file, size in zip(self._files, sizes, strict=True) for block in range(size)]
        random.Random(0).shuffle(blocks)
        self._blocks = blocks * (1 + 100 * BLOCKS_PER_RUN // len(blocks))
        self._buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES))

    def run(self) -> float:
        """Bytes per second."""
        blocks = [self._blocks.pop() for _ in range(BLOCKS_PER_RUN)]
        started = time.perf_counter()
        for file, block in blocks:
            assert os.preadv(file, [self._buffer], block * BLOCK_BYTES) == BLOCK_BYTES
        return BLOCKS_PER_RUN * BLOCK_BYTES / (time.perf_counter() - started)


class Prompts:
    """Runs the round's prompt on either model; each round has another one."""

    def __init__(self, vocabulary: int, num_tokens: int) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._shape = (vocabulary, num_tokens)
        self.ids = torch.empty(0)
        self.seen: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        self.logits: dict[str, torch.Tensor] = {}

    def draw(self) -> None:
        """The next prompt."""
        vocabulary, num_tokens = self._shape
        self.ids = torch.randint(1, vocabulary, (1, num_tokens), generator=self._generator)

    def run(self, name: str, model: Any) -> float:
        """Seconds; what was read for it goes to `seen`."""
        if name == "cold":
            empty_pool(model)
        before, started = model.foreroute.stats(), time.perf_counter()
        self.logits[name] = model(self.ids, use_cache=False, logits_to_keep=1).logits
        seconds = time.perf_counter() - started
        stats = model.foreroute.stats().minus(before).prefill
        if name in self.seen:
            distinct = (stats.hits + stats.late_hits + stats.misses) * model.foreroute.plan.expert_bytes
            read = stats.demand_bytes + stats.prefetch_bytes
            self.seen[name].append({"read_bytes": read, "read_of_distinct": read / distinct, "stall_s": stats.stall_s})
        return seconds


def empty_pool(model: Any) -> None:
    """As after loading: no expert is there."""
    model.foreroute.engine.pool.reset()


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--packed", default="no", help="a packed store, quantised or not; safetensors when left out")
    parser.add_argument("--memory", default="25%")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prefetch-prefill", default="auto")
    parser.add_argument("--trial", action="store_true", help="keep nothing")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)

    def load(memory: str) -> Any:
        config = EngineConfig(packed=asked.packed, predictor="no", prefetch_prefill=asked.prefetch_prefill)
        return foreroute.load(asked.model, memory, config=config)

    offloaded, resident = load(asked.memory), load("100%")
    files = sorted(asked.model.glob("*.safetensors")) if asked.packed == "no" else [Path(asked.packed)]
    bare = BareReads(files)
    prompts = Prompts(offloaded.config.vocab_size, asked.tokens)
    prompts.draw()
    turns = {
        "cold": lambda: prompts.run("cold", offloaded),
        "warm": lambda: prompts.run("warm", offloaded),
        "resident": lambda: prompts.run("resident", resident),
        "bytes_per_s": bare.run,
    }
    figures: dict[str, list[float]] = {name: [] for name in turns}
    for run in turns.values():
        run()
    for seen in prompts.seen.values():
        seen.clear()
    is_same = True
    for repeat in range(asked.repeats):
        prompts.draw()
        for name in turns if repeat % 2 == 0 else reversed(turns):
            figures[name].append(turns[name]())
        is_same &= all(torch.equal(prompts.logits[name], prompts.logits["resident"]) for name in ("cold", "warm"))
    result = {
        "model": asked.model.name,
        "store": Path(asked.packed).name,
        "stored_dtype": offloaded.foreroute.plan.stored_dtype,
        "memory": asked.memory,
        "tokens": asked.tokens,
        "threads": asked.threads,
        "prefetch": asked.prefetch_prefill,
        "same_logits": is_same,
        "disk_gb_per_s": _harness.summary([rate / 1e9 for rate in figures["bytes_per_s"]]),
        "compute_floor_ms": _harness.summary([1e3 * seconds for seconds in figures["resident"]]),
        **{name: beside_floors(figures, prompts.seen[name], name) for name in prompts.seen},
    }
    for model in (offloaded, resident):
        model.foreroute.close()
    name = f"prefill-floor-{offloaded.foreroute.plan.stored_dtype.lower()}-{asked.tokens}"
    _harness.record(name, _harness.rounded(result), {"figures": figures, "seen": prompts.seen}, keep=not asked.trial)
    assert is_same, "logits differ"


def beside_floors(figures: dict[str, list[float]], seen: list[dict[str, float]], name: str) -> dict[str, Any]:
    """A contender's times, what it read, and how near it came to the larger floor, by round."""
    disk_s = [one["read_bytes"] / rate for one, rate in zip(seen, figures["bytes_per_s"], strict=True)]
    floors = [max(pair) for pair in zip(disk_s, figures["resident"], strict=True)]
    return {
        "ms": _harness.summary([1e3 * seconds for seconds in figures[name]]),
        "disk_floor_ms": _harness.summary([1e3 * seconds for seconds in disk_s]),
        "of_larger_floor": _harness.summary([a / b for a, b in zip(floors, figures[name], strict=True)]),
        "read_mb": _harness.summary([one["read_bytes"] / 1e6 for one in seen]),
        "read_of_distinct": _harness.summary([one["read_of_distinct"] for one in seen]),
        "stall_ms": _harness.summary([1e3 * one["stall_s"] for one in seen]),
    }


if __name__ == "__main__":
    main()
