"""Which tokens may come next in an answer that follows a grammar."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from transformers.generation.logits_process import LogitsProcessor

from foreroute.errors import GrammarError


class GrammarMask:
    """The state of one answer within its grammar. For one thread at a time.

    Args:
        matcher: llguidance's, at the answer's start. vocab_size: of the logits. ends: tokens that end an answer.
    """

    def __init__(self, matcher: Any, vocab_size: int, ends: Collection[int]) -> None:
        self._matcher, self._vocab_size, self._ends = matcher, vocab_size, ends

    def is_end(self, token: int) -> bool:
        """Whether `token` ends an answer."""
        return token in self._ends

    @property
    def is_complete(self) -> bool:
        """Whether the grammar allows nothing more than an end."""
        return bool(self._matcher.is_stopped())

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [vocabulary] with -inf where the grammar allows no token.

        Where other settings (min_tokens, suppress_tokens) rule out every token that it allows, these are all as likely:
        the grammar holds.

        Raises:
            GrammarError: the grammar takes too much memory or time in this place.
        """
        allowed = self.allowed().to(scores.device)
        masked = scores.masked_fill(~allowed, -torch.inf)
        if bool(torch.isneginf(masked).all()):
            masked = torch.zeros_like(scores).masked_fill(~allowed, -torch.inf)
        return masked

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next, bool [vocabulary].

        Raises:
            GrammarError: as `apply`.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        found = np.unpackbits(bits, count=min(self._vocab_size, 8 * len(bits)), bitorder="little")
        allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
        allowed[: len(found)] = torch.from_numpy(found).bool()
        if not found.any():
            raise GrammarError("The answer is complete, and this model has no end token.")
        return allowed

    def accept(self, token: int) -> None:
        """Go on behind `token`, which was chosen; a token that ends the answer changes nothing.

        Raises:
            GrammarError: the grammar does not allow it.
        """
        if token not in self._ends and not self._matcher.consume_token(token):
            self._check()
            raise GrammarError("The answer left its grammar.")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError("The grammar became too large on the way through the answer. Make it simpler.")


class GrammarProcessor(LogitsProcessor):
    """A logits processor that keeps every row's answer within a grammar. Use a new one for each call of generate().

    Args:
        start: makes the mask of one answer.
    """

    def __init__(self, start: Callable[[], GrammarMask]) -> None:
        self._start = start
        self._num_prompt: int | None = None
        # Of each row: its tokens, its mask, and whether it has ended: what follows is padding.
        self._rows: list[tuple[list[int], GrammarMask, bool]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask scores [rows, vocabulary] by ids [rows, tokens]; the first call has the prompts alone.

        The scores of a row that has ended stay as they are: what it is given then is padding.

        Raises:
            GrammarError: see `GrammarMask.apply`.
        """
        if self._num_prompt is None:
            self._num_prompt = input_ids.shape[1]
        before, self._rows = self._rows, []
        masked = scores.clone()
        for at, new in enumerate(input_ids[:, self._num_prompt :].tolist()):
            # A beam may go on from what was another row.
            is_same = at < len(before) and new[: len(before[at][0])] == before[at][0]
            seen, mask, has_ended = before[at] if is_same else ([], self._start(), False)
            for token in new[len(seen) :]:
                if not has_ended:
                    mask.accept(token)
                    has_ended = mask.is_end(token)
            self._rows.append((new, mask, has_ended))
            if not has_ended:
                masked[at] = mask.apply(scores[at])
        return masked
