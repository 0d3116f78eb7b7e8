"""What the engine asks while it decodes: the experts to fetch early, as plain lists."""

from collections.abc import Callable, Sequence

import torch

from foreroute.predict.base import Predictor, Seen, Select, guess_from_scores, most_wanted
from foreroute.predict.token_table import RunningContext, TokenTable


def no_residual(layer: int) -> torch.Tensor | None:
    """The residual of a MoE layer where no predictor reads it."""
    return None


class PrefetchGuesses:
    """A predictor's guesses over all tokens of a step, read back to the host.

    Args:
        num_experts: per MoE layer. widths: per MoE layer, experts guessed per token.
        first: guesses layer 0 from the tokens, when there is one; select: reads its scores.
        residual_of: MoE layer -> the step's residual stream after its attention; where no predictor reads it, nothing.
    """

    def __init__(
        self,
        predictor: Predictor,
        num_experts: Sequence[int],
        widths: Sequence[int],
        first: TokenTable | None = None,
        residual_of: Callable[[int], torch.Tensor | None] = no_residual,
        select: Select = guess_from_scores,
    ) -> None:
        self._predictor = predictor
        self._num_experts = list(num_experts)
        self._widths = list(widths)
        self._first = first
        self._select = select
        self._context = RunningContext()
        self._residual_of = residual_of

    def guess(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Sequence[int]:
        """Experts of MoE layer `layer + 1`, distinct, best first. Arguments as in `Seen`. Cost: one read-back."""
        guess = self._predictor.guess(
            layer, Seen(hidden, ids, weights, self._residual_of(layer)), self._widths[layer + 1]
        )
        return () if guess is None else most_wanted(guess.ids, self._num_experts[layer + 1])

    def guess_first(self, token_ids: torch.Tensor) -> Sequence[int]:
        """Experts of MoE layer 0 for the step's `token_ids` [tokens], distinct, best first."""
        if self._first is None:
            return ()
        context = self._context.of_rows(len(token_ids))
        guess = self._first.guess(token_ids, context, self._widths[0], self._select)
        return most_wanted(guess.ids, self._num_experts[0])

    def see_first(self, hidden: torch.Tensor, num_rows: int) -> None:
        """Layer 0's router input of a step, [rows x positions, hidden]: what the next guess of it leans on."""
        if self._first is not None:
            self._context.see(hidden, num_rows)
