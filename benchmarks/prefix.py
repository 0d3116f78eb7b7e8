"""Conversations that begin alike, as agents' do: what a turn waits for, beside its new tokens alone.

    python -m benchmarks.prefix build/synth --memory 2GiB [--beginning 8000] [--conversations 4] [--turns 10]

Each conversation is the same beginning (a system prompt with tools), and in each turn some new tokens and an answer.
The conversations take turns, so that none follows itself. The time to the first token of each turn after the first of
a conversation is compared with that of a prompt of as many new tokens and nothing before them, asked right after by the
same engine: the median of the ratios. What the process has in RAM at most is compared with what the plan says.

It fails where a turn computes more than its new tokens and the last one of before, or the memory is beyond the plan by
more than 5 %; of a family with states the first two conversations may compute the beginning. The last line is JSON.
"""

import argparse
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch

from benchmarks import _harness
from benchmarks.peer_runner import memory_bytes
from foreroute import EngineConfig
from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Finished, NewToken, Request, Sampling
from foreroute.memory.serving import serving_needs
from foreroute.model.caches import needs_state

_OVER_PLAN = 1.05


class _Words:
    """A tokenizer in name only: the model is random."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(chr(0x4E00 + token % 20000) for token in ids)

    def get_vocab(self) -> dict[str, int]:
        return {}


def ask(engine: BatchEngine, ids: list[int], new: int) -> tuple[float, list[int], Finished]:
    """Return a request's time to its first token in seconds, its tokens, and its end."""
    events: list[tuple[float, Any]] = []
    is_over = threading.Event()

    def hear(event: Any) -> None:
        events.append((time.perf_counter(), event))
        if isinstance(event, Finished):
            is_over.set()

    began = time.perf_counter()
    engine.submit(Request(ids, new, Sampling(temperature=0.0), ignore_eos=True), hear)
    is_over.wait()
    tokens = [(at, event.token_id) for at, event in events if isinstance(event, NewToken)]
    end = events[-1][1]
    if not tokens:
        raise SystemExit(f"a request failed: {end.error}")
    return tokens[0][0] - began, [token for _, token in tokens], end


def main() -> None:
    """Let the conversations take turns, and record what they waited for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory")
    parser.add_argument("--prefix-cache")
    parser.add_argument("--beginning", type=int, default=8000)
    parser.add_argument("--conversations", type=int, default=4)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--new", type=int, default=100, help="tokens of a turn beside the answer of before")
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--no-record", action="store_true")
    asked = parser.parse_args()
    context = asked.beginning + asked.turns * (asked.new + asked.answer) + 64
    config = EngineConfig(kv_tokens=2 * context, prefix_cache=asked.prefix_cache, packed="no")
    model = foreroute.load(asked.model, asked.memory, config=config)
    handle = model.foreroute
    needs = serving_needs(model, handle.plan, handle.layers, handle.host_engine.pool.residency, 2 * context)
    engine = BatchEngine(model, _Words(), context, kv_tokens=2 * context)
    draw, vocabulary = torch.Generator().manual_seed(0), model.config.get_text_config().vocab_size

    def some(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=draw).tolist()

    beginning = some(asked.beginning)
    texts = [list(beginning) for _ in range(asked.conversations)]
    ttft_s: list[list[float]] = [[] for _ in texts]
    ratios, alone_s, twice = [], [], []
    may_compute = 2 if needs_state(model) else 1
    for turn in range(asked.turns):
        for at, ids in enumerate(texts):
            known = len(ids) - 1 if turn or at >= may_compute else 0
            ids += some(asked.new)
            first_s, tokens, end = ask(engine, ids, asked.answer)
            ttft_s[at].append(first_s)
            # Of an answer the last token was chosen and not computed.
            if end.cached_tokens < known:
                twice.append({"conversation": at, "turn": turn, "computed_twice": known - end.cached_tokens})
            computed = len(ids) - end.cached_tokens
            ids += tokens
            if turn:
                alone, _, _ = ask(engine, some(computed), 1)
                alone_s.append(alone)
                ratios.append(first_s / alone)
        print(f"turn {turn}: {[round(one[-1], 3) for one in ttft_s]} s to the first token", file=sys.stderr, flush=True)
    engine.close()
    state, peak = engine.state(), memory_bytes("VmHWM")
    result = {
        "beginning": asked.beginning, "conversations": asked.conversations, "turns": asked.turns,
        "cold_ttft_s": ttft_s[0][0], "later_ttft_s": statistics.median(s for one in ttft_s for s in one[1:]),
        "new_tokens_alone_s": statistics.median(alone_s), "ratio": statistics.median(ratios),
        "ratio_most": max(ratios), "tokens_saved": state.prefix_tokens, "kept_bytes": state.prefix_bytes,
        "peak_rss_bytes": peak, "plan_bytes": needs.total_bytes, "over_plan": peak / needs.total_bytes,
        "computed_twice": twice,
    }  # fmt: skip
    model.foreroute.close()
    _harness.record("prefix", result, {"ttft_s": ttft_s, "alone_s": alone_s}, keep=not asked.no_record)
    if twice or peak > _OVER_PLAN * needs.total_bytes:
        sys.exit(1)


if __name__ == "__main__":
    main()
