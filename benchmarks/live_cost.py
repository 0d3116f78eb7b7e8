"""`python -m benchmarks.live_cost`: what a watched engine loses: time per token without and with the page and metrics.

While watched, one viewer reads the feed of server/watching/live.py in a thread, as a server does, and /metrics is
read once a second; nothing is drawn, and nothing sent over a network. The viewer comes and goes within an answer, every
--block tokens, and the next answer to the same prompt is watched where this one was not: two blocks of both are a four,
in which neither the text nor a machine that grows slower favours a side. What is said is the median of the fours'
shares, and where it lies with 95 % confidence (bootstrap). `parts` are timed by themselves: what the recorder was told
in an answer told once more, a picture, a scrape. The last line is JSON.
"""

import argparse
import asyncio
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

from benchmarks._harness import record, rounded
from foreroute.engine.interfaces import StepInfo

ROOT = Path(__file__).parents[1]
PROMPT = "import os\nimport sys\n\n\ndef main(argv):\n"
_RESAMPLES = 4000
_TOLD = ("begin_step", "begin_layer", "looked_up", "end_layer", "stalled", "guessed", "deferred", "arrived")


class Block(NamedTuple):
    """Milliseconds per token: by the clock, and processor time of the engine's thread and of all threads."""

    tpot_ms: float
    thread_cpu_ms: float
    cpu_ms: float


class Watcher:
    """One viewer who also reads the metrics, in a thread of its own, whenever it is told to."""

    def __init__(self, expose: Callable[[], bytes]) -> None:
        self.feed: Any = None
        self.is_on = False
        self.num_bytes = self.num_events = self.num_scrapes = 0
        self._expose = expose
        self._watched_s, self._began_s = 0.5, 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def switch(self) -> None:
        """Come, or go."""
        now = time.perf_counter()
        self.is_on = not self.is_on
        if self.is_on:
            assert self.feed.enter()
            self._began_s = now
            asyncio.run_coroutine_threadsafe(self._watch(), self._loop)
        else:
            self.feed.leave()
            self._watched_s += now - self._began_s

    async def _watch(self) -> None:
        if self._watched_s >= 1:
            self._watched_s -= 1
            self._expose()
            self.num_scrapes += 1
        async for event in self.feed.events():
            self.num_events += 1
            self.num_bytes += len(event)

    def close(self) -> None:
        """Stop the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


class Switching:
    """Times an engine's decode steps in blocks of `length`, and switches the watcher between any two blocks."""

    def __init__(self, engine: Any, watcher: Watcher, length: int) -> None:
        self._pool, self._watcher, self._length = engine.pool, watcher, length
        self._begin_step = engine.begin_step
        engine.begin_step = self._step
        self.blocks: list[Block] = []
        self._steps = 0
        self._before: tuple[float, ...] = ()

    def start(self, num_blocks: int) -> None:
        """Blocks of the following answer."""
        self.blocks, self._steps, self._left, self._before = [], 0, num_blocks, ()

    def _step(self, info: StepInfo) -> None:
        if not info.is_prefill:
            if self._steps % self._length == 0 and self._left >= 0:
                self._at_boundary()
            self._steps += 1
        self._begin_step(info)

    def _at_boundary(self) -> None:
        now = time.perf_counter(), time.thread_time(), time.process_time()
        if self._before:
            self.blocks.append(
                Block(*((one - old) * 1e3 / self._length for one, old in zip(now, self._before, strict=True)))
            )
            assert bool(self._pool.observers) == self._watcher.is_on, "without a viewer there are no observers"
            self._watcher.switch()
        self._left -= 1
        self._before = time.perf_counter(), time.thread_time(), time.process_time()


def confident(shares: list[float]) -> list[float]:
    """The median, and the ends of its 95 % confidence interval."""
    dice = random.Random(1)
    medians = sorted(median(dice.choices(shares, k=len(shares))) for _ in range(_RESAMPLES))
    return [median(shares), medians[int(_RESAMPLES * 0.025)], medians[int(_RESAMPLES * 0.975)]]


def shares_of(fours: list[tuple[list[Block], list[Block]]]) -> dict[str, list[float]]:
    """For each field of Block, what the watched two of a four take more than the others: see `confident`."""
    return {
        name: confident(
            [sum(one[place] for one in watched) / sum(one[place] for one in free) - 1 for free, watched in fours]
        )
        for place, name in enumerate(Block._fields)
    }


def parts_of(feed: Any, answer: Callable[[], object], expose: Callable[[], bytes], num_tokens: int) -> dict[str, float]:
    """Microseconds of what watching is made of, each timed alone and so with warm caches."""
    told: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    assert feed.enter()
    recorder = feed._recorder

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            told.append((method, arguments))
            return method(*arguments)

        return noted

    for name in _TOLD:
        setattr(recorder, name, noting(getattr(recorder, name)))
    answer()
    for name in _TOLD:
        delattr(recorder, name)

    def tell() -> None:
        for method, arguments in told:
            method(*arguments)

    def timed(call: Callable[[], object], repeats: int = 21) -> float:
        took = []
        for _ in range(repeats):
            began_s = time.perf_counter()
            call()
            took.append((time.perf_counter() - began_s) * 1e6)
        return median(took)

    step = recorder.last
    parts = {
        "told_us_per_token": timed(tell) / num_tokens,
        "picture_us": timed(lambda: feed.snapshot(step, is_busy=True)),
        "scrape_us": timed(expose),
    }
    feed.leave()
    return parts


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "foreroute-tiny")
    parser.add_argument("--memory", default="25%")
    parser.add_argument("--answers", type=int, default=60)
    parser.add_argument("--blocks", type=int, default=4, help="of an answer")
    parser.add_argument("--block", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="a trial: nothing is kept")
    args = parser.parse_args()
    import torch

    import foreroute
    from foreroute.generation.generate import generate
    from foreroute.model.text import encode_prompt, load_tokenizer
    from foreroute.server.watching.live import LiveFeed
    from foreroute.server.watching.metrics import ServerMetrics

    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model)
    # The governor would choose by what it measures, and so differ between the two.
    model = foreroute.load(args.model, args.memory, config=foreroute.EngineConfig(governor=False))
    idle = SimpleNamespace(running=1, waiting=0, kv_blocks=0, kv_blocks_used=0)
    loaded = SimpleNamespace(engine=SimpleNamespace(state=lambda: idle), model=model)
    expose = ServerMetrics(SimpleNamespace(loaded=loaded)).expose
    watcher = Watcher(expose)
    watcher.feed = LiveFeed(
        model.foreroute.engine, model.foreroute.plan, args.model.name, is_over=lambda: not watcher.is_on
    )
    prompt_ids = encode_prompt(tokenizer, PROMPT, chat=False)
    num_tokens = args.blocks * args.block + 2
    tokens: set[tuple[int, ...]] = set()

    def answer() -> None:
        report = generate(model, tokenizer, prompt_ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)
        tokens.add(report.token_ids)

    answer()
    switching = Switching(model.foreroute.engine, watcher, args.block)
    answers: list[list[Block]] = []
    fours: list[tuple[list[Block], list[Block]]] = []
    for number in range(args.answers // 2 * 2):
        # The first block of every second answer is watched.
        if watcher.is_on != bool(number % 2):
            watcher.switch()
        switching.start(args.blocks)
        answer()
        answers.append(switching.blocks)
        if number % 2:
            free_first, watched_first = answers[-2:]
            fours += [
                ([free_first[at], watched_first[at + 1]], [free_first[at + 1], watched_first[at]])
                for at in range(0, args.blocks - 1, 2)
            ]
        if number % 10 == 9:
            found = shares_of(fours)["tpot_ms"]
            print(f"{number + 1} answers: {found[0]:+.2%} ({found[1]:+.2%} to {found[2]:+.2%})", flush=True)
    if watcher.is_on:
        watcher.switch()
    switching.start(-1)
    answer()
    assert len(tokens) == 1, "who is watched says the same"
    result: dict[str, Any] = {"model": args.model.name, "memory": args.memory, "fours": len(fours)}
    for place, name in enumerate(Block._fields):
        result[f"{name}_without"] = median(one[place] for free, _ in fours for one in free)
        result[f"{name}_watched"] = median(one[place] for _, watched in fours for one in watched)
    for name, (middle, low, high) in shares_of(fours).items():
        result[f"{name}_cost_share"], result[f"{name}_cost_share_95"] = middle, [low, high]
    result["events"], result["scrapes"] = watcher.num_events, watcher.num_scrapes
    result["kb_per_event"] = watcher.num_bytes / max(watcher.num_events, 1) / 1e3
    result["parts"] = parts_of(watcher.feed, answer, expose, num_tokens)
    watcher.close()
    record("live-cost", rounded(result, 4), {"fours": fours}, keep=not args.no_record)
    model.foreroute.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
