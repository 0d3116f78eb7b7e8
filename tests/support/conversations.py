"""Answers of the engine and of a resident model that is fed the same pieces, with what each token was chosen from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from foreroute.generation.generate import GenerationReport, generate
from foreroute.model.caches import cache_argument
from tests.support.runs import make_batch

PROMPT = make_batch(23).ids
NEW_TOKENS = 10


class Words:
    """A tokenizer in name only: what is said does not matter here."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(chr(0x4E00 + token) for token in ids)

    def get_vocab(self) -> dict[str, int]:
        return {}


@dataclass
class Scores(LogitsProcessor):
    """Notes what every token is chosen from, and changes nothing."""

    seen: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(scores.clone())
        return scores


def answer(
    model: Any, ids: torch.Tensor, new_tokens: int = NEW_TOKENS, **options: Any
) -> tuple[GenerationReport, list[torch.Tensor]]:
    """Greedy, and past any end, unless the options say otherwise: the report, and per token logits [1, vocabulary]."""
    scores = Scores()
    options = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": None, **options}
    report = generate(model, Words(), ids, logits_processor=LogitsProcessorList([scores]), **options)
    return report, scores.seen


@torch.no_grad()
def fed(
    model: Any, pieces: Sequence[torch.Tensor], cache: DynamicCache, new_tokens: int = NEW_TOKENS
) -> tuple[list[int], list[torch.Tensor]]:
    """What a resident model says greedily after these pieces, each computed at once, one after the other."""
    for piece in pieces:
        logits = model(piece, **cache_argument(cache), use_cache=True, logits_to_keep=1).logits[:, -1].float()
    tokens, seen = [], []
    while len(tokens) < new_tokens:
        seen.append(logits)
        token = logits.argmax(-1, keepdim=True)
        tokens.append(int(token))
        if len(tokens) < new_tokens:
            logits = model(token, **cache_argument(cache), use_cache=True).logits[:, -1].float()
    return tokens, seen


def empty_cache(model: Any) -> DynamicCache:
    """What generate() would begin with."""
    return DynamicCache(config=model.config)


def assert_same(
    ours: tuple[GenerationReport, list[torch.Tensor]], tokens: list[int], logits: list[torch.Tensor]
) -> None:
    """The same tokens, from the same bits."""
    report, seen = ours
    assert list(report.token_ids) == tokens
    assert len(set(tokens)) > 3, "a model that repeats itself tests little"
    assert len(seen) == len(logits)
    for left, right in zip(seen, logits, strict=True):
        assert torch.equal(left.view(torch.int32), right.view(torch.int32))


def longer(ids: torch.Tensor, report: GenerationReport, seed: int = 5) -> torch.Tensor:
    """The next prompt of a conversation: what was said so far, and something new."""
    return torch.cat([ids, torch.tensor([report.token_ids]), make_batch(6, seed=seed).ids], dim=1)
