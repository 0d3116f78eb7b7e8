"""Turn predictions into plain lists of experts to prefetch while decoding."""

from collections.abc import Callable, Sequence

import torch

from foreroute.predict.base import Predictor, RouterSample, Select, guess_from_scores, most_wanted
from foreroute.predict.fitted import RunningContext, TokenTable

# Experts with less of a token's predicted gate mass are not prefetched where misses are not waited for.
_LEAST_WEIGHT = 0.05


def no_residual(layer: int) -> torch.Tensor | None:
    """A `residual_of` for models where no predictor reads the residual; its [tokens, hidden] is always None."""
    return None


class PrefetchGuesses:
    """Merges a predictor's guesses over all tokens of a step and reads them back to the host.

    Args:
        num_experts: per MoE layer. widths: per MoE layer, experts guessed per token.
        first: predicts `first_layer` from the tokens, where given; select: reads its scores.
        residual_of: MoE layer -> residual stream of the step after its attention; None where no predictor reads it.
        first_by_tokens: that layer's choice for token ids [tokens], where they alone decide it, or None just now; asked
            before `first`.
        first_layer: the first MoE layer of a decode step.
        widths_without_waiting: used in place of `widths` while `without_waiting` is True.

    Attributes:
        without_waiting: some misses will be substituted. Likely experts beyond the router's top-k then pay, and those
            of little gate weight are left out, as little is lost without them.
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
        first_layer: int = 0,
    ) -> None:
        self._predictor = predictor
        self._num_experts = list(num_experts)
        self._widths = list(widths)
        self._widths_without_waiting = list(widths_without_waiting or widths)
        self.without_waiting = False
        self._first = first
        self._first_by_tokens = first_by_tokens
        self._first_layer = first_layer
        self._select = select
        self._context = RunningContext()
        self._residual_of = residual_of

    def guess(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Sequence[int]:
        """Predict MoE layer `layer + 1`: distinct experts, best first. Cost: a read-back.

        Args:
            hidden: [tokens, hidden], input of layer `layer`'s router. ids, weights: [tokens, k], its choice.
        """
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
            # Tokens without any expert are padding, all of it alike: it would outvote the others.
            likely = likely[(ids < self._num_experts[layer]).any(-1)]
        return most_wanted(likely, num_experts)

    def guess_first(self, token_ids: torch.Tensor, num_rows: int | None = None) -> Sequence[int]:
        """Predict a decode step's first MoE layer for its `token_ids` [rows x positions]: distinct experts, best first.

        A row's positions have the context of the first, as that of the others is not computed yet.
        """
        first = self._first_layer
        if self._first_by_tokens is not None:
            ids = self._first_by_tokens(token_ids)
            return () if ids is None else most_wanted(ids, self._num_experts[first])
        if self._first is None:
            return ()
        num_rows = len(token_ids) if num_rows is None else num_rows
        context = self._context.of_rows(num_rows)
        if context is not None and num_rows < len(token_ids):
            context = context.repeat_interleave(len(token_ids) // num_rows, 0)
        widths = self._widths_without_waiting if self.without_waiting else self._widths
        guess = self._first.guess(token_ids, context, widths[first], self._select)
        return most_wanted(guess.ids, self._num_experts[first])

    def see_first(self, hidden: torch.Tensor, num_rows: int, *, goes_on: bool = False) -> None:
        """Note a step's input of that layer's router, [num_rows x positions, hidden]: context of its next guess."""
        if self._first is not None:
            self._context.see(hidden, num_rows, goes_on=goes_on)

    def drop_last(self, count: int) -> None:
        """See `PrefetchSource`."""
        self._context.drop_last(count)
