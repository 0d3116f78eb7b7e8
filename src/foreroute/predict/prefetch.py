"""What the engine asks while it decodes: the experts to fetch early, as plain lists."""

from collections.abc import Callable, Sequence

import torch

from foreroute.predict.base import Predictor, RouterSample, Select, guess_from_scores, most_wanted
from foreroute.predict.token_table import RunningContext, TokenTable

# Of a token's guessed gate mass: what weighs less is not fetched where it need not be waited for.
_LEAST_WEIGHT = 0.05


def no_residual(layer: int) -> torch.Tensor | None:
    """The residual of a MoE layer where no predictor reads it."""
    return None


class PrefetchGuesses:
    """A predictor's guesses over all tokens of a step, read back to the host.

    Args:
        num_experts: per MoE layer. widths: per MoE layer, experts guessed per token.
        first: guesses layer 0 from the tokens, when there is one; select: reads its scores.
        residual_of: MoE layer -> the step's residual stream after its attention; where no predictor reads it, nothing.
        first_by_tokens: layer 0's own choice for token ids [tokens], where it goes by them alone, or None just now; it
            is asked in place of `first`.
        widths_without_waiting: those that hold while `without_waiting` is True; `widths` when left out.

    Attributes:
        without_waiting: some misses will not be waited for. What is likely is then worth more than the router's
            top-k: a guess of little weight is left out, as little is lost without it.
    """

    def __init__(
        self,
        predictor: Predictor,
        num_experts: Sequence[int],
        widths: Sequence[int],
        first: TokenTable | None = None,
        residual_of: Callable[[int], torch.Tensor | None] = no_residual,
        select: Select = guess_from_scores,
        widths_without_waiting: Sequence[int] | None = None,
        first_by_tokens: Callable[[torch.Tensor], torch.Tensor | None] | None = None,
    ) -> None:
        self._predictor = predictor
        self._num_experts = list(num_experts)
        self._widths = list(widths)
        self._widths_without_waiting = list(widths_without_waiting or widths)
        self.without_waiting = False
        self._first = first
        self._first_by_tokens = first_by_tokens
        self._select = select
        self._context = RunningContext()
        self._residual_of = residual_of

    def guess(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Sequence[int]:
        """Experts of MoE layer `layer + 1`, distinct, best first. Arguments as of `RouterSample`. Cost: a read-back."""
        widths = self._widths_without_waiting if self.without_waiting else self._widths
        guess = self._predictor.guess(
            layer, RouterSample(hidden, ids, weights, self._residual_of(layer)), widths[layer + 1]
        )
        if guess is None:
            return ()
        num_experts, likely = self._num_experts[layer + 1], guess.ids
        if self.without_waiting:
            likely = likely.masked_fill(
                guess.weights < _LEAST_WEIGHT * guess.weights.sum(-1, keepdim=True), num_experts
            )
        if len(ids) > 1:
            # What no expert computes is padding, all of it alike: it would outvote the others.
            likely = likely[(ids < self._num_experts[layer]).any(-1)]
        return most_wanted(likely, num_experts)

    def guess_first(self, token_ids: torch.Tensor) -> Sequence[int]:
        """Experts of MoE layer 0 for the step's `token_ids` [tokens], distinct, best first."""
        if self._first_by_tokens is not None:
            ids = self._first_by_tokens(token_ids)
            return () if ids is None else most_wanted(ids, self._num_experts[0])
        if self._first is None:
            return ()
        context = self._context.of_rows(len(token_ids))
        widths = self._widths_without_waiting if self.without_waiting else self._widths
        guess = self._first.guess(token_ids, context, widths[0], self._select)
        return most_wanted(guess.ids, self._num_experts[0])

    def see_first(self, hidden: torch.Tensor, num_rows: int) -> None:
        """Layer 0's router input of a step, [rows x positions, hidden]: what the next guess of it leans on."""
        if self._first is not None:
            self._context.see(hidden, num_rows)
