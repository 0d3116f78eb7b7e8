"""`python -m benchmarks.live_cost`: what a watched engine loses: TPOT without and with a viewer of the feed, in turns.

The viewer reads the feed of server/live.py in a thread of its own, as a server does; it draws nothing. Both answer the
same prompt, A-B-B-A, and give the same tokens. The last line is JSON.
"""

import argparse
import asyncio
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._harness import record, rounded

ROOT = Path(__file__).parents[1]
PROMPT = "import os\nimport sys\n\n\ndef main(argv):\n"


class Viewer:
    """One viewer, from entering to leaving."""

    def __init__(self, feed: Any) -> None:
        self._feed, self._is_over = feed, threading.Event()
        self.num_bytes = self.num_events = 0

    def __enter__(self) -> "Viewer":
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch()))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    async def _watch(self) -> None:
        viewer = self._feed.events()
        async for event in viewer:
            self.num_events += 1
            self.num_bytes += len(event)
            if self._is_over.is_set():
                break
        await viewer.aclose()


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "foreroute-tiny")
    parser.add_argument("--memory", default="25%")
    parser.add_argument("--repeats", type=int, default=8, help="of A-B-B-A")
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="a trial: nothing is kept")
    args = parser.parse_args()
    import torch

    import foreroute
    from foreroute.engine.generate import generate
    from foreroute.engine.text import encode_prompt, load_tokenizer
    from foreroute.server.live import LiveFeed

    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model)
    # The governor would choose by what it measures, and so differ between the two.
    model = foreroute.load(args.model, args.memory, config=foreroute.EngineConfig(governor=False))
    feed = LiveFeed(model.foreroute.runtime, model.foreroute.plan, args.model.name)
    prompt_ids = encode_prompt(tokenizer, PROMPT, chat=False)
    tokens: set[tuple[int, ...]] = set()

    def answer() -> float:
        began_s = time.process_time()
        report = generate(
            model, tokenizer, prompt_ids, max_new_tokens=args.new_tokens, do_sample=False, eos_token_id=None
        )
        tokens.add(report.token_ids)
        assert report.tpot_s is not None, "there are many tokens"
        cpu_ms.append((time.process_time() - began_s) * 1e3 / args.new_tokens)
        return report.tpot_s * 1e3

    def watched() -> float:
        with Viewer(feed) as viewer:
            tpot_ms = answer()
        sent.append((viewer.num_events, viewer.num_bytes))
        answered_unwatched.append(generate(model, tokenizer, prompt_ids, max_new_tokens=2, do_sample=False))
        return tpot_ms

    sent: list[tuple[int, int]] = []
    answered_unwatched: list[Any] = []
    cpu_ms: list[float] = []
    answer()
    cpu_ms.clear()
    without, with_viewer = [], []
    for _ in range(args.repeats):
        for run, found in ((answer, without), (watched, with_viewer), (watched, with_viewer), (answer, without)):
            found.append(run())
        print(f"without {median(without):.3f} ms, with a viewer {median(with_viewer):.3f} ms", flush=True)
    assert len(tokens) == 1, "who is watched says the same"
    assert model.foreroute.runtime.tracing is None, "the last viewer's going ends the recording"
    paired = [
        (b + c) / (a + d) - 1
        for a, d, b, c in zip(without[::2], without[1::2], with_viewer[::2], with_viewer[1::2], strict=True)
    ]
    # All threads' processor time, the viewer's too: tells more than TPOT where other programs run.
    in_fours = [cpu_ms[at : at + 4] for at in range(0, len(cpu_ms), 4)]
    cpu_shares = [(b + c) / (a + d) - 1 for a, b, c, d in in_fours]
    result = {
        "model": args.model.name,
        "memory": args.memory,
        "tpot_ms_without": median(without),
        "tpot_ms_with_viewer": median(with_viewer),
        "cost_share": median(paired),
        "cost_share_range": [min(paired), max(paired)],
        "cpu_ms_per_token_without": median(one for four in in_fours for one in (four[0], four[3])),
        "cpu_ms_per_token_with_viewer": median(one for four in in_fours for one in four[1:3]),
        "cpu_cost_share": median(cpu_shares),
        "cpu_cost_share_range": [min(cpu_shares), max(cpu_shares)],
        "events_per_answer": median(events for events, _ in sent),
        "kb_per_event": median(nbytes / max(events, 1) for events, nbytes in sent) / 1e3,
    }
    record(
        "live-cost",
        rounded(result, 4),
        {"without_ms": without, "with_viewer_ms": with_viewer, "pairs": paired, "cpu_ms": cpu_ms},
        keep=not args.no_record,
    )
    model.foreroute.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
