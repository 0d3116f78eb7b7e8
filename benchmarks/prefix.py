"""Conversations that begin alike, as agents' do: what a turn waits for, beside its new tokens alone.

    python -m benchmarks.prefix build/synth --memory 2GiB [--beginning 8000] [--conversations 4] [--turns 10]

Each conversation is the same beginning (a system prompt with tools), and in each turn some new tokens and an answer.
The conversations take turns, so that none follows itself. The time to the first token of each turn after the first of
a conversation is compared, right after it, with two others of as many new tokens; medians of the ratios are told:

- of their step alone, where as much is before them and lies in the cache already: attention to it is the model's own
  work, and what the ratio shows is what finding and copying a beginning costs;
- of a prompt that is these new tokens and nothing before them, asked of the same engine: attention to the beginning
  counts too, which no reuse saves. The larger experts are beside attention, the nearer it comes to the other.

It fails where the first ratio is above --check, or the second above --check-alone; a turn computes more than its new
tokens and the last one of before; the process has more in RAM than the plan says and 5 %; or a conversation's first
turns, computed anew in the same chunks with nothing reused, have other bits (the tokens, and the logprobs of the first
of each turn). Of a family with states the first two conversations may compute the beginning. The last line is JSON.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
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
from foreroute.batching.rows import RowsCache
from foreroute.memory.serving import serving_needs
from foreroute.model.caches import needs_state

_OVER_PLAN = 1.05


class _Words:
    """A tokenizer in name only: the model is random."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(chr(0x4E00 + token % 20000) for token in ids)

    def get_vocab(self) -> dict[str, int]:
        return {}


@dataclass(frozen=True)
class Asked:
    """A request's time to its first token, that token's logprob, all tokens, and how many were not computed."""

    first_s: float
    logprob: float | None
    tokens: list[int]
    num_cached: int


def ask(engine: BatchEngine, ids: list[int], new: int) -> Asked:
    """Ask for `new` tokens after `ids`."""
    events: list[tuple[float, Any]] = []
    is_over = threading.Event()

    def hear(event: Any) -> None:
        events.append((time.perf_counter(), event))
        if isinstance(event, Finished):
            is_over.set()

    began = time.perf_counter()
    engine.submit(Request(ids, new, Sampling(temperature=0.0), num_top_logprobs=0, ignore_eos=True), hear)
    is_over.wait()
    tokens = [(at, event) for at, event in events if isinstance(event, NewToken)]
    end = events[-1][1]
    if not tokens:
        raise SystemExit(f"a request failed: {end.error}")
    first_at, first = tokens[0]
    return Asked(first_at - began, first.logprob, [event.token_id for _, event in tokens], end.cached_tokens)


@torch.no_grad()
def step_s(model: Any, engine: BatchEngine, ids: list[int], num_cached: int) -> float:
    """Seconds of the step that computes `ids` after the first `num_cached`, which lie in its cache."""
    assert engine._kept is not None
    found = engine._kept._cache.find(model, ids, num_cached)
    assert found is not None, "what the turn has found is still kept"
    assert found.length == num_cached, "it is found again"
    rows = RowsCache(model)
    rows.arrange([], [(found, num_cached)])
    began = time.perf_counter()
    int(rows.step([ids[num_cached:]], "prefill")[0, -1].argmax())
    return time.perf_counter() - began


@torch.no_grad()
def differing_turns(model: Any, turns: list[tuple[list[int], Asked]]) -> list[int]:
    """Which of a conversation's first turns are not what their chunks give with nothing reused.

    turns: the prompt of each, and what came.
    """
    rows, chunk, done, wrong = RowsCache(model), model.foreroute.plan.prefill_chunk, 0, []
    rows.arrange([], [(None, 0)])
    for turn, (prompt, asked) in enumerate(turns):
        while done < len(prompt):
            part = prompt[done : done + chunk]
            logits = rows.step([part], "prefill")[0, -1].float()
            done += len(part)
        logprob, tokens = torch.log_softmax(logits, -1)[asked.tokens[0]].item(), [int(logits.argmax())]
        while len(tokens) < len(asked.tokens):
            tokens.append(int(rows.step([tokens[-1:]], "decode")[0, -1].float().argmax()))
            done += 1
        if tokens != asked.tokens or logprob != asked.logprob:
            wrong.append(turn)
    return wrong


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
    parser.add_argument("--check", type=float, default=1.1, help="the most that the first ratio may be")
    parser.add_argument("--check-alone", type=float, help="the most that the second may be; not checked without it")
    parser.add_argument("--bits", type=int, default=2, help="turns of a conversation that are computed anew")
    parser.add_argument("--no-record", action="store_true")
    asked = parser.parse_args()
    context = asked.beginning + asked.turns * (asked.new + asked.answer) + 64
    config = EngineConfig(kv_tokens=2 * context, prefix_cache=asked.prefix_cache, packed="no")
    model = foreroute.load(asked.model, asked.memory, config=config)
    handle = model.foreroute
    needs = serving_needs(model, handle.plan, handle.layers, handle.host_engine.pool.residency, 2 * context, context)
    engine = BatchEngine(model, _Words(), context, kv_tokens=2 * context)
    draw, vocabulary = torch.Generator().manual_seed(0), model.config.get_text_config().vocab_size

    def some(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=draw).tolist()

    beginning = some(asked.beginning)
    texts = [list(beginning) for _ in range(asked.conversations)]
    ttft_s: list[list[float]] = [[] for _ in texts]
    steps_s, alone_s, twice = [], [], []
    first_turns: list[tuple[list[int], Asked]] = []
    may_compute = 2 if needs_state(model) else 1
    for turn in range(asked.turns):
        for at, ids in enumerate(texts):
            known = len(ids) - 1 if turn or at >= may_compute else 0
            ids += some(asked.new)
            got = ask(engine, ids, asked.answer)
            ttft_s[at].append(got.first_s)
            # Of an answer the last token was chosen and not computed.
            if got.num_cached < known:
                twice.append({"conversation": at, "turn": turn, "computed_twice": known - got.num_cached})
            if turn:
                steps_s.append(step_s(model, engine, ids, got.num_cached))
                alone_s.append(ask(engine, some(len(ids) - got.num_cached), 1).first_s)
            if at == 0 and turn < asked.bits:
                first_turns.append((list(ids), got))
            ids += got.tokens
        print(f"turn {turn}: {[round(one[-1], 3) for one in ttft_s]} s to the first token", file=sys.stderr, flush=True)
    engine.close()
    state, peak = engine.state(), memory_bytes("VmHWM")
    later_s = [ttft_s[at][turn] for turn in range(1, asked.turns) for at in range(asked.conversations)]
    ratios = [[one / other for one, other in zip(later_s, others, strict=True)] for others in (steps_s, alone_s)]
    result = {
        "beginning": asked.beginning, "conversations": asked.conversations, "turns": asked.turns,
        "cold_ttft_s": ttft_s[0][0], "later_ttft_s": statistics.median(later_s),
        "step_s": statistics.median(steps_s), "new_tokens_alone_s": statistics.median(alone_s),
        "ratio": statistics.median(ratios[0]), "ratio_most": max(ratios[0]),
        "ratio_alone": statistics.median(ratios[1]), "ratio_alone_most": max(ratios[1]),
        "tokens_saved": state.prefix_tokens, "kept_bytes": state.prefix_bytes,
        "peak_rss_bytes": peak, "plan_bytes": needs.total_bytes, "over_plan": peak / needs.total_bytes,
        "computed_twice": twice, "turns_computed_anew": len(first_turns),
        "differing_turns": differing_turns(model, first_turns),
    }  # fmt: skip
    model.foreroute.close()
    raw = {"ttft_s": ttft_s, "step_s": steps_s, "alone_s": alone_s}
    _harness.record("prefix", result, raw, keep=not asked.no_record)
    wrong = faults(result, asked.check, asked.check_alone)
    for fault in wrong:
        print(f"FAULT {fault}", file=sys.stderr)
    sys.exit(bool(wrong))


def faults(result: Mapping[str, Any], most: float, most_alone: float | None) -> list[str]:
    """What is not as it should be; none is what is wanted."""
    wrong = []
    if result["ratio"] > most:
        wrong.append(f"a turn waits {result['ratio']:.2f} times its step, and {most} are allowed")
    if most_alone is not None and result["ratio_alone"] > most_alone:
        wrong.append(f"a turn waits {result['ratio_alone']:.2f} times its tokens alone, and {most_alone} are allowed")
    if result["over_plan"] > _OVER_PLAN:
        wrong.append(f"the peak is {result['over_plan']:.1%} of the plan")
    wrong += [f"computed twice: {one}" for one in result["computed_twice"]]
    wrong += [f"turn {turn} has other bits when nothing is reused" for turn in result["differing_turns"]]
    return wrong


if __name__ == "__main__":
    main()
