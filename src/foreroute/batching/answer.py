"""The state of one request, from its admission to its last event: prompt chunks, tokens, text."""

import logging
import math
import time
from collections.abc import Callable, Collection
from typing import Any

import torch

from foreroute.batching.requests import AnswerEvent, Finished, NewToken, PromptProgress, PromptScored, Request, Top
from foreroute.batching.sampler import Sampler, score
from foreroute.drafting.drafters import Drafter
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.generation_settings import stop_strings
from foreroute.model.text import StopText, TextPieces

_LOG = logging.getLogger(__name__)


class Answer:
    """The engine's state of one request. Only the engine's thread uses it, except `cancel`.

    Args:
        limit: most tokens of the answer. turn: its place among those that wait, the lowest first.

    Attributes:
        ids: the prompt and the answer so far. most: their number at its end, at most.
        reserved: most tokens that its row can come to hold as yet; see batching/room.py.
        num_computed: tokens with keys and values in the cache.
        num_cached: those of them that came from an earlier request. num_prompt: tokens of the prompt.
        num_prefill: tokens to be computed in prefill: the prompt, and after a pause the answer so far.
        has_begun: whether something of it was computed, perhaps before it was set aside.
        stops: numbers of tokens at which a chunk of the prompt shall end, so that others can continue there.
        shared: with how many tokens other prompts begin like this one, as far as that was looked at.
        reusable: a version of what is kept of prompts, and how many of its tokens are kept there.
        drafter: of its next tokens, once something was drafted.
    """

    def __init__(
        self,
        request: Request,
        on_event: Callable[[AnswerEvent], None],
        limit: int,
        turn: int = 0,
    ) -> None:
        self.request = request
        self.is_cancelled, self.why_cancelled = False, ""
        self.ids = list(request.prompt_ids)
        self.num_computed = self.num_cached = 0
        self.drafter: Drafter | None = None
        self._on_event = on_event
        self.num_prompt, self.turn, self.has_begun = len(self.ids), turn, False
        self.most = self.reserved = self.num_prompt + limit
        self.stops: set[int] = set()
        self.shared: dict[Answer, int] = {}
        self.num_prefill, self._num_told = self.num_prompt, 0
        self.reusable: tuple[int, int] | None = None
        self._limit, self._is_scored = limit, False
        self._until_s = math.inf
        self._logprobs: list[float | None] = [None]
        self._tops: list[Top | None] = [None]

    def cancel(self, why: str) -> None:
        """Mark it as cancelled; the first reason counts."""
        if not self.is_cancelled:
            self.why_cancelled = why
            self.is_cancelled = True

    def begin(self, tokenizer: Any, model: OffloadedModel, num_cached: int) -> None:
        """Prepare to compute its tokens after the first `num_cached`, whose keys and values are cached.

        One that was set aside goes on where it was: its tokens so far are computed as its prompt is.
        """
        self.num_computed, self.num_prefill = num_cached, len(self.ids)
        self.shared.clear()  # it has waited: references would keep each answer before it alive
        self.reusable = None
        self._logprobs, self._tops = [None], [None]
        if self.has_begun:
            return
        self.has_begun, self.num_cached = True, num_cached
        if not self.wants_none:
            grammar = self.request.grammar
            mask = None if grammar is None else grammar.start()
            self._sampler = Sampler(model, self.request.sampling, self.ids, self._limit, mask)
        if model.generation_config.max_time is not None:
            self._until_s = time.monotonic() + model.generation_config.max_time
        own = () if self.request.ignore_eos else stop_strings(model.generation_config)
        self._pieces, self._text = (
            TextPieces(tokenizer, self.request.shown_special),
            StopText((*self.request.stop, *own)),
        )

    def next_chunk(self, most: int) -> list[int]:
        """Return the next tokens to compute in prefill, at most `most`, and none behind the next stop."""
        ahead = (stop for stop in self.stops if stop > self.num_computed)
        return self.ids[self.num_computed : min(self.num_computed + most, self.num_prefill, *ahead)]

    @property
    def is_prompt_computed(self) -> bool:
        """Whether every token is that is computed in prefill."""
        return self.num_computed >= self.num_prefill

    @property
    def wants_scores(self) -> bool:
        """Whether the prompt is still to be scored."""
        return self.request.wants_prompt_scores and not self._is_scored

    def took(self, num_tokens: int, logits: torch.Tensor) -> bool:
        """Count `num_tokens` tokens computed in prefill; return whether that is complete.

        Args:
            logits: [positions, vocabulary]; of every one of these tokens if the request wants scores.
        """
        if self.wants_scores:
            self._score(logits[-num_tokens:])
        self.num_computed += num_tokens
        done = min(self.num_computed, self.num_prompt)
        if done > self._num_told:
            self._num_told = done
            self.tell(PromptProgress(done, self.num_prompt))
        if not self.is_prompt_computed:
            return False
        if self.wants_scores:
            self._is_scored = True
            self.tell(PromptScored(self._logprobs, self._tops))
        return True

    def _score(self, logits: torch.Tensor) -> None:
        """Score the prompt tokens that follow the current chunk's. logits: [tokens, vocabulary] of the chunk."""
        following = self.ids[self.num_computed + 1 : self.num_computed + 1 + len(logits)]
        for row, token in zip(logits, following, strict=False):
            logprob, top = score(row.float(), token, self.request.num_top_logprobs or 0)
            self._logprobs.append(logprob)
            self._tops.append(top)

    @property
    def num_left(self) -> int:
        """Tokens that the answer may still get before it needs more room."""
        return self.reserved - len(self.ids)

    @property
    def wants_none(self) -> bool:
        """Whether only the prompt's scores are asked for."""
        return self._limit == 0

    def advance(self, logits: torch.Tensor, likeliest: int, ends: Collection[int]) -> Finished | None:
        """Choose the next token, and send its event.

        Args:
            logits: [vocabulary] fp32. likeliest: their argmax. ends: tokens that end an answer.
        Returns:
            The last event, if that was the last token.
        """
        token = likeliest if self._sampler.is_greedy else self._sampler.draw(logits)
        self.ids.append(token)
        is_end = token in ends and not self.request.ignore_eos
        piece = "" if is_end else self._text.push(self._pieces.push(token), self._pieces.hidden(token))
        self.tell(NewToken(token, piece, *score(logits, token, self.request.num_top_logprobs)))
        if is_end or self._text.is_over or self._sampler.is_complete:
            return self.finished("stop")
        is_over = len(self.ids) >= self.most or time.monotonic() > self._until_s
        return self.finished("length") if is_over else None

    def finished(self, reason: str, error: str | None = None, *, is_refusal: bool = False) -> Finished:
        """The last event, with the text that was still held back."""
        tail, found = "", None
        if reason in ("stop", "length") and not self.wants_none:
            tail = self._text.push(self._pieces.finish())
            tail += "" if self._text.is_over else self._text.rest()
            found = self._text.found
        num_new = len(self.ids) - self.num_prompt
        return Finished(reason, self.num_prompt, num_new, self.num_cached, tail, error, is_refusal, found)

    def tell(self, event: AnswerEvent) -> None:
        """Send an event; a receiver that fails cancels the request."""
        if isinstance(event, Finished):
            self.shared.clear()
            self.drafter = None
        try:
            self._on_event(event)
        except Exception:  # noqa: BLE001  the others' answers go on
            _LOG.exception("a request's events could not be handed on; it is cancelled")
            self.cancel("Its events could not be handed on.")
