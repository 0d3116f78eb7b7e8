"""Draft the tokens that are likely to come next: from the text itself, or by a small model.

A drafter proposes one text. The model verifies it by choosing each token as it always does, so that a draft changes how
soon tokens come, and not which ones, whether they are sampled or not.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from transformers.cache_utils import DynamicCache

from foreroute.drafting.lean_llama import lean_llama
from foreroute.model.caches import cache_argument
from foreroute.model.draft_model import DraftModel

# Lengths of the ends of a text that are looked up, the longest first.
_ENDS = (4, 3, 2)
# Prompt tokens that a draft model computes at once.
_CHUNK = 2048


class Drafter(Protocol):
    """Drafts the continuation of a text, any text in any call; one call at a time."""

    def draft(self, ids: Sequence[int], most: int, least_confidence: float) -> Iterator[int]:
        """Yield at most `most` tokens to follow `ids`; fewer, or none, where they are not likely enough.

        least_confidence: probability, by the drafter's own estimate, that all tokens so far are accepted, below which
        it may end.
        """
        ...


class PromptLookup:
    """Drafts what followed the last time that the text's last tokens occurred in it. Costs no time worth mention."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        # An end -> the position after its last occurrence, and after the one before that, where there is one.
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}

    def draft(self, ids: Sequence[int], most: int, least_confidence: float) -> Iterator[int]:
        """See `Drafter`; it makes no estimate."""
        self._take(ids)
        for length in _ENDS:
            # The last occurrence is the end itself.
            _, place = self._places.get(tuple(self._ids[-length:]), (0, 0))
            if place:
                # What is drafted may itself go on into what was drafted before, as in a text that repeats.
                drafted = self._ids[place : place + most]
                while len(drafted) < most:
                    drafted += drafted[: most - len(drafted)]
                yield from drafted
                return

    def _take(self, ids: Sequence[int]) -> None:
        """Note the ends of `ids` that are new; all of them where it does not begin as the last text."""
        if self._ids != list(ids[: len(self._ids)]):
            self._ids, self._places = [], {}
        held = self._ids
        for token in ids[len(held) :]:
            held.append(token)
            for length in _ENDS:
                if len(held) >= length:
                    end = tuple(held[-length:])
                    last, _ = self._places.get(end, (0, 0))
                    self._places[end] = (len(held), last)


class ModelDrafter:
    """Drafts the likeliest tokens of a small model, which has the text so far in a cache of its own.

    Args:
        draft: the model. vocabulary: tokens of the model that verifies; others are not drafted.
    """

    def __init__(self, draft: DraftModel, vocabulary: int) -> None:
        self._model: Any = draft.model
        self._context, self._vocabulary = draft.context, vocabulary
        self._ids: list[int] = []  # of the tokens in the cache
        self._cache = DynamicCache(config=draft.model.config)
        self._lean = lean_llama(draft.model)

    @torch.no_grad()
    def draft(self, ids: Sequence[int], most: int, least_confidence: float) -> Iterator[int]:
        """See `Drafter`. Cost: a forward pass of the small model for each token."""
        if self._context is not None:
            most = min(most, self._context - len(ids))
        if most <= 0:
            return
        new = self._rest(ids)
        confidence = 1.0
        for _ in range(most):
            try:
                scores = self._compute(new)
            except BaseException:
                # An error or Ctrl-C in the middle of a pass: layers may hold more tokens than are counted.
                self._forget()
                raise
            token = int(scores.argmax())
            confidence *= float(torch.exp(scores[token] - scores.logsumexp(-1)))
            if confidence < least_confidence:
                return
            yield token
            new = [token]

    def _rest(self, ids: Sequence[int]) -> list[int]:
        """Remove from the cache what does not begin `ids`; return the tokens that follow what is kept, at least one."""
        held = self._ids
        known = min(len(held), len(ids) - 1)
        while known and held[known - 1] != ids[known - 1]:
            known -= 1
        if held[:known] != list(ids[:known]):
            known = next(at for at in range(known) if held[at] != ids[at])
        if known < len(held):
            self._cut(len(held) - known)
            known = len(self._ids)
        return list(ids[known:])

    def _cut(self, count: int) -> None:
        """Remove the last `count` tokens from the cache; all of them where a window's first have left it."""
        if self._lean is not None:
            self._lean.length -= count
            del self._ids[len(self._ids) - count :]
            return
        try:
            self._cache.crop(-count)
            del self._ids[len(self._ids) - count :]
        except RuntimeError:
            self._forget()

    def _forget(self) -> None:
        """Empty the cache."""
        self._cache = DynamicCache(config=self._model.config)
        self._ids = []
        if self._lean is not None:
            self._lean.begin()

    def _compute(self, tokens: list[int]) -> torch.Tensor:
        """Add `tokens` to the cache; scores [vocabulary] of the next one, in f32."""
        if self._lean is not None:
            for at in range(0, len(tokens), _CHUNK):
                chunk = tokens[at : at + _CHUNK]
                scores = self._lean(chunk)
                self._ids += chunk
            return scores[: self._vocabulary]
        while True:
            chunk, tokens = tokens[:_CHUNK], tokens[_CHUNK:]
            out = self._model(
                input_ids=torch.tensor([chunk]),
                **cache_argument(self._cache),
                use_cache=True,
                return_dict=True,
                logits_to_keep=1,
            )
            self._ids += chunk
            if not tokens:
                last: torch.Tensor = out.logits[0, -1, : self._vocabulary].float()
                return last
