"""Baselines that a predictor must beat, and controls that show that the measurement is sound.

Recall alone means little: always popular experts, or those that the previous token used, already reach some.
The oracle must read exactly 100 %; a guess shuffled over the tokens must fall to popularity's recall.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from foreroute.predict.base import Predictor, RouterSample, Select, TokenGuess
from foreroute.predict.fitted import TokenTable, context_before
from foreroute.predict.lookahead import NextRouter


class Moment(NamedTuple):
    """One MoE layer on the tokens of one forward pass, with its routing known, to be compared with a guess.

    layer: the predicted layer. num_experts: its experts. now: its input and choice: the truth.
    before: the sample of the MoE layer before it; None for the first of a decoder or an encoder. token_ids: [tokens].
    context: positions per row; tokens are rows of the batch, one after the other. pass_index: counts forward passes.
    """

    layer: int
    num_experts: int
    now: RouterSample
    before: RouterSample | None
    token_ids: torch.Tensor
    context: int
    pass_index: int


# Predicts a moment: (moment, width) -> at most `width` experts per token, or None for no guess.
Guesser = Callable[[Moment, int], TokenGuess | None]


def of_predictor(predictor: Predictor, first: Guesser | None = None) -> Guesser:
    """Wrap `predictor` as a guesser; `first` predicts a decode step's first layer."""

    def guess(moment: Moment, width: int) -> TokenGuess | None:
        if moment.before is None:
            return None if first is None else first(moment, width)
        return predictor.guess(moment.layer - 1, moment.before, width)

    return guess


def first_only(table: TokenTable, select: Select, first: int = 0) -> Guesser:
    """Predict layer `first` from the token `table`, with `select` reading its scores; None for the other layers."""

    def guess(moment: Moment, width: int) -> TokenGuess | None:
        return table.guess(moment.token_ids, context_of(moment), width, select) if moment.layer == first else None

    return guess


def context_of(moment: Moment) -> torch.Tensor:
    """The context [tokens, hidden] of each token at layer 0, from the router's input at the tokens before."""
    hidden = moment.now.hidden
    return context_before(hidden.view(-1, moment.context, hidden.shape[-1])).flatten(0, 1)


def oracle(routers: Sequence[NextRouter | None]) -> Guesser:
    """Run each layer's own router on its own input; less than exactly 100 % recall is an error of measurement."""

    def guess(moment: Moment, width: int) -> TokenGuess | None:
        router = routers[moment.layer]
        return None if router is None else router.guess(moment.now.hidden, width)

    return guess


def uniform(seed: int = 0) -> Guesser:
    """Draw experts at random by `seed`: recall is width / experts."""

    def guess(moment: Moment, width: int) -> TokenGuess:
        scores = torch.rand(
            len(moment.token_ids), moment.num_experts, generator=_generator(seed, moment), dtype=torch.float32
        )
        return _equal_weights(torch.topk(scores, min(width, moment.num_experts)).indices)

    return guess


def shuffled(guesser: Guesser, seed: int = 0) -> Guesser:
    """Give each of `guesser`'s guesses to another token of the pass, by `seed`: recall left is not the token's."""

    def guess(moment: Moment, width: int) -> TokenGuess | None:
        made = guesser(moment, width)
        if made is None:
            return None
        order = torch.randperm(len(made.ids), generator=_generator(seed, moment))
        return TokenGuess(made.ids[order], made.weights[order])

    return guess


class Popularity:
    """Predicts the experts that each layer routed most tokens to so far, in the scored text and in `counts`.

    Args:
        counts: per MoE layer [experts], from calibration; zeros where unknown.
    """

    def __init__(self, counts: Sequence[torch.Tensor]) -> None:
        self._counts = [layer.clone() for layer in counts]

    def __call__(self, moment: Moment, width: int) -> TokenGuess:
        """See `Guesser`."""
        best = torch.topk(self._counts[moment.layer], min(width, moment.num_experts)).indices
        return _equal_weights(best.expand(len(moment.token_ids), -1))

    def learn(self, moment: Moment) -> None:
        """Count a moment's routing, after all guesses for it were made."""
        self._counts[moment.layer] += expert_counts(moment.now.ids, moment.num_experts)

    def scores(self, layer: int) -> torch.Tensor:
        """Each expert's share of the layer's routing, [experts], 0 to 1."""
        counts = self._counts[layer].float()
        return counts / counts.sum().clamp(min=1)


def previous_token(popularity: Popularity) -> Guesser:
    """Predict the choice for the token before, then `popularity`'s; those alone for a row's first token."""

    def guess(moment: Moment, width: int) -> TokenGuess:
        scores = popularity.scores(moment.layer).expand(len(moment.token_ids), -1)
        # One more column, for ids outside the experts.
        chosen = torch.zeros(len(moment.token_ids), moment.num_experts + 1, dtype=torch.float32)
        weights = moment.now.weights.float()
        ranks = weights.argsort(-1).argsort(-1).float() + 2.0  # above any share
        chosen.scatter_(1, moment.now.ids.clamp(max=moment.num_experts), ranks)
        before = torch.zeros_like(chosen)
        before[1:] = chosen[:-1]
        before[:: moment.context] = 0.0
        total = scores + before[:, : moment.num_experts]
        return _equal_weights(torch.topk(total, min(width, moment.num_experts)).indices)

    return guess


def expert_counts(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count how often each expert was chosen, [num_experts] int64; other `ids` [tokens, k] are left out."""
    return torch.bincount(ids.flatten().clamp(max=num_experts), minlength=num_experts + 1)[:num_experts]


def _equal_weights(ids: torch.Tensor) -> TokenGuess:
    return TokenGuess(ids, torch.full(ids.shape, 1.0 / ids.shape[-1], dtype=torch.float32))


def _generator(seed: int, moment: Moment) -> torch.Generator:
    """A generator per moment, so that the order in which predictors run changes no number."""
    return torch.Generator().manual_seed((seed * 1_000_003 + moment.pass_index) * 4099 + moment.layer)
