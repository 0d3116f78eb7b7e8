"""The steps of one answer with a draft: tokens are drafted, and computed together with the one before them.

The loop chooses each token from its logits as without a draft. While its choices are those that were drafted, the next
logits are there already; from the first other one on, what was computed is taken back.
"""

import time
from collections.abc import Callable
from typing import Protocol

import torch
from transformers.cache_utils import DynamicCache

from foreroute.drafting.draft import GovernedDraft
from foreroute.engine.interfaces import MOST_VERIFIED, Phase
from foreroute.engine.moe_step import MoeStep
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.rewind import Rewind


class Compute(Protocol):
    """Computes tokens [1, positions] after those in the cache: logits [positions, vocabulary]."""

    def __call__(self, tokens: torch.Tensor, phase: Phase, *, num_dropped: int = 0) -> torch.Tensor: ...


class DraftedSteps:
    """Gives one answer's logits, token by token.

    Args:
        cache: of the model, with the prompt in it. compute: a step of the model, which adds to the cache.
        end: tokens of prompt and answer at most.

    Attributes:
        drafted, accepted, verify_steps: of this answer.
    """

    def __init__(
        self,
        model: OffloadedModel,
        draft: GovernedDraft,
        cache: DynamicCache,
        compute: Compute,
        prompt_ids: list[int],
        end: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._draft, self._cache, self._compute, self._clock = draft, cache, compute, clock
        self._device, self._end = model.device, end
        engine = model.foreroute.engine
        self._engine = engine if isinstance(engine, MoeStep) else None
        self._ids = list(prompt_ids)
        # Of the last step: its drafted tokens, logits of all its positions, how many of the drafted were chosen, and
        # what takes the others back.
        self._drafted: list[int] = []
        self._rows: torch.Tensor | None = None
        self._chosen = 0
        self._rewind: Rewind | None = None
        self._limit = 0
        self._began_s: float | None = None
        self._num_dropped = 0
        self.drafted = self.accepted = self.verify_steps = 0
        draft.governor.begin()

    @property
    def num_chosen(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self._ids)

    def after(self, token: int) -> torch.Tensor:
        """Return the logits [1, vocabulary] after `token`, which was chosen from those before."""
        self._ids.append(token)
        if self._rows is not None and self._chosen < len(self._drafted) and self._drafted[self._chosen] == token:
            self._chosen += 1
            self.accepted += 1
        else:
            self._end_step()
            self._begin_step(token)
        assert self._rows is not None, "a step has begun"
        return self._rows[self._chosen : self._chosen + 1]

    def close(self) -> None:
        """Take back what the last step computed beyond the chosen tokens."""
        self._take_back()

    def _take_back(self) -> None:
        self._num_dropped = len(self._drafted) - self._chosen
        if self._rewind is not None:
            self._rewind.drop(self._num_dropped, len(self._drafted) + 1)
        self._rewind, self._rows = None, None
        self._drafted = self._drafted[: self._chosen]

    def _end_step(self) -> None:
        num_drafted = len(self._drafted)
        self._take_back()
        now = self._clock()
        if self._began_s is not None:
            self._draft.governor.step(num_drafted, self._chosen, now - self._began_s, self._limit)
        self._began_s = now

    def _begin_step(self, token: int) -> None:
        draft = self._draft
        longest = MOST_VERIFIED if draft.most is None else min(MOST_VERIFIED, draft.most)
        self._limit = min(draft.governor.length, longest - 1, self._end - len(self._ids) - 1)
        self._drafted, self._chosen = [], 0
        if self._limit > 0:
            self._think()
        tokens = torch.tensor([[token, *self._drafted]], device=self._device)
        if not self._drafted:
            self._rows = self._compute(tokens, "decode", num_dropped=self._num_dropped)
            return
        self._rewind = Rewind(self._cache)
        self.drafted += len(self._drafted)
        self.verify_steps += 1
        with draft.alike.running():
            self._rows = self._compute(tokens, "verify", num_dropped=self._num_dropped)

    def _think(self) -> None:
        """Draft; experts of what is drafted are prefetched meanwhile."""
        drafter, governor = self._draft.drafter, self._draft.governor
        for token in drafter.draft(self._ids, self._limit, governor.least_confidence):
            self._drafted.append(token)
            if self._engine is not None:
                self._engine.expect(torch.tensor([token]), 1)
