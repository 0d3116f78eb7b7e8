"""`python -m benchmarks.live_cost`: what a watched engine loses: TPOT without and with the page and metrics, in turns.

Watched: one viewer reads the feed of server/live.py in a thread of its own, as a server does, and /metrics is read once
a second there; nothing is drawn and nothing sent over a network. Each pair is two neighbouring answers to one prompt,
the order changing, with the same tokens. What is said is the median of the pairs' shares, and where it lies with 95 %
confidence (bootstrap over pairs): one pair tells little on a machine that does other things. The last line is JSON.
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

ROOT = Path(__file__).parents[1]
PROMPT = "import os\nimport sys\n\n\ndef main(argv):\n"
_SCRAPES_S = 1.0
_RESAMPLES = 4000


class Answer(NamedTuple):
    """Milliseconds per token: TPOT, processor time of the engine's thread, and of all threads, the viewer's too."""

    tpot_ms: float
    thread_cpu_ms: float
    cpu_ms: float


class Watcher:
    """One viewer who also reads the metrics, from entering to leaving."""

    def __init__(self, feed: Any, expose: Callable[[], bytes]) -> None:
        self._feed, self._expose = feed, expose
        self._is_over = threading.Event()
        self.num_bytes = self.num_events = self.num_scrapes = 0

    def __enter__(self) -> "Watcher":
        assert self._feed.enter()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch()))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._feed.leave()

    async def _watch(self) -> None:
        scraping = asyncio.ensure_future(self._scrape())
        async for event in self._feed.events():
            self.num_events += 1
            self.num_bytes += len(event)
            if self._is_over.is_set():
                break
        scraping.cancel()

    async def _scrape(self) -> None:
        # The middle of the second, so that a short answer gets its share of scrapes.
        await asyncio.sleep(_SCRAPES_S / 2)
        while True:
            self._expose()
            self.num_scrapes += 1
            await asyncio.sleep(_SCRAPES_S)


def confident(shares: list[float]) -> list[float]:
    """The median, and the ends of its 95 % confidence interval."""
    dice = random.Random(1)
    medians = sorted(median(dice.choices(shares, k=len(shares))) for _ in range(_RESAMPLES))
    return [median(shares), medians[int(_RESAMPLES * 0.025)], medians[int(_RESAMPLES * 0.975)]]


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "foreroute-tiny")
    parser.add_argument("--memory", default="25%")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="a trial: nothing is kept")
    args = parser.parse_args()
    import torch

    import foreroute
    from foreroute.engine.generate import generate
    from foreroute.engine.text import encode_prompt, load_tokenizer
    from foreroute.server.live import LiveFeed
    from foreroute.server.metrics import ServerMetrics

    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model)
    # The governor would choose by what it measures, and so differ between the two.
    model = foreroute.load(args.model, args.memory, config=foreroute.EngineConfig(governor=False))
    runtime = model.foreroute.runtime
    feed = LiveFeed(runtime, model.foreroute.plan, args.model.name)
    idle = SimpleNamespace(running=1, waiting=0, kv_blocks=0, kv_blocks_used=0)
    loaded = SimpleNamespace(engine=SimpleNamespace(state=lambda: idle), model=model)
    metrics = ServerMetrics(SimpleNamespace(loaded=loaded))
    prompt_ids = encode_prompt(tokenizer, PROMPT, chat=False)
    tokens: set[tuple[int, ...]] = set()

    def answer() -> Answer:
        # The first tokens let the recorder come and go.
        generate(model, tokenizer, prompt_ids, max_new_tokens=2, do_sample=False)
        began = time.thread_time(), time.process_time()
        report = generate(
            model, tokenizer, prompt_ids, max_new_tokens=args.new_tokens, do_sample=False, eos_token_id=None
        )
        ended = time.thread_time(), time.process_time()
        tokens.add(report.token_ids)
        assert report.tpot_s is not None, "there are many tokens"
        own, every = ((now - then) * 1e3 / args.new_tokens for then, now in zip(began, ended, strict=True))
        return Answer(report.tpot_s * 1e3, own, every)

    def unwatched() -> Answer:
        found = answer()
        assert runtime.tracing is None, "the last viewer's going ends the recording"
        return found

    def watched() -> Answer:
        with Watcher(feed, metrics.expose) as watcher:
            found = answer()
            assert runtime.tracing is not None
        watchers.append(watcher)
        return found

    watchers: list[Watcher] = []
    answer()
    pairs: list[tuple[Answer, Answer]] = []
    for number in range(args.pairs):
        if number % 2:
            with_page = watched()
            pairs.append((unwatched(), with_page))
        else:
            pairs.append((unwatched(), watched()))
        if number % 10 == 9:
            print(f"{number + 1} pairs: {_shares(pairs)['tpot'][0]:+.2%} of TPOT", flush=True)
    assert len(tokens) == 1, "who is watched says the same"
    without, with_page = zip(*pairs, strict=True)
    result: dict[str, Any] = {"model": args.model.name, "memory": args.memory, "pairs": args.pairs}
    for name in Answer._fields:
        result[f"{name}_without"] = median(getattr(one, name) for one in without)
        result[f"{name}_watched"] = median(getattr(one, name) for one in with_page)
    shares = _shares(pairs)
    for name, (middle, low, high) in shares.items():
        result[f"{name}_cost_share"], result[f"{name}_cost_share_95"] = middle, [low, high]
    result["events_per_answer"] = median(one.num_events for one in watchers)
    result["kb_per_event"] = median(one.num_bytes / one.num_events for one in watchers) / 1e3
    result["scrapes"] = sum(one.num_scrapes for one in watchers)
    record(
        "live-cost",
        rounded(result, 4),
        {"without": without, "watched": with_page},
        keep=not args.no_record,
    )
    model.foreroute.close()
    return 0


def _shares(pairs: list[tuple[Answer, Answer]]) -> dict[str, list[float]]:
    return {
        name: confident([watched[place] / without[place] - 1 for without, watched in pairs])
        for place, name in enumerate(("tpot", "thread_cpu", "cpu"))
    }


if __name__ == "__main__":
    sys.exit(main())
