"""What a predictor must beat, and what shows that the measurement itself is sound.

A recall means little alone: experts that are always popular, or that the previous token used, give some for nothing.
The oracle must read exactly 100 %; a guess shuffled over the tokens must fall to what popularity gives.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from foreroute.predict.base import Predictor, RouterSample, Select, TokenGuess
from foreroute.predict.lookahead import NextRouter
from foreroute.predict.token_table import TokenTable, context_before


class Moment(NamedTuple):
    """A MoE layer on the tokens of one forward pass, when its routing is known and can be compared with a guess.

    layer: the layer that is guessed. num_experts: its experts. now: what it saw and chose: the truth.
    before: what the MoE layer before it saw; None for layer 0. token_ids: [tokens]. context: positions per row; tokens
    are rows of the batch, one after the other. pass_index: counts forward passes.
    """

    layer: int
    num_experts: int
    now: RouterSample
    before: RouterSample | None
    token_ids: torch.Tensor
    context: int
    pass_index: int


# A guess for a moment: (moment, width) -> at most `width` experts per token, None where there is nothing to say.
Guesser = Callable[[Moment, int], TokenGuess | None]


def of_predictor(predictor: Predictor, first: Guesser | None = None) -> Guesser:
    """A predictor as a guesser; `first` guesses layer 0."""

    def guess(moment: Moment, width: int) -> TokenGuess | None:
        if moment.before is None:
            return None if first is None else first(moment, width)
        return predictor.guess(moment.layer - 1, moment.before, width)

    return guess


def first_only(table: TokenTable, select: Select) -> Guesser:
    """The token table alone: layer 0, and no other."""

    def guess(moment: Moment, width: int) -> TokenGuess | None:
        return table.guess(moment.token_ids, context_of(moment), width, select) if moment.layer == 0 else None

    return guess


def context_of(moment: Moment) -> torch.Tensor:
    """[tokens, hidden]: the context of each token at layer 0, by what its router read at the tokens before."""
    hidden = moment.now.hidden
    return context_before(hidden.view(-1, moment.context, hidden.shape[-1])).flatten(0, 1)


def oracle(routers: Sequence[NextRouter | None]) -> Guesser:
    """Zero staleness: the layer's own router on its own input. What is not exactly 100 % is an error of measurement."""

    def guess(moment: Moment, width: int) -> TokenGuess | None:
        router = routers[moment.layer]
        return None if router is None else router.guess(moment.now.hidden, width)

    return guess


def uniform(seed: int = 0) -> Guesser:
    """Experts drawn at random: recall is width / experts."""

    def guess(moment: Moment, width: int) -> TokenGuess:
        scores = torch.rand(
            len(moment.token_ids), moment.num_experts, generator=_generator(seed, moment), dtype=torch.float32
        )
        return _equal_weights(torch.topk(scores, min(width, moment.num_experts)).indices)

    return guess


def shuffled(guesser: Guesser, seed: int = 0) -> Guesser:
    """`guesser`'s guesses, each given to another token of the pass: what is left is not about the token."""

    def guess(moment: Moment, width: int) -> TokenGuess | None:
        made = guesser(moment, width)
        if made is None:
            return None
        order = torch.randperm(len(made.ids), generator=_generator(seed, moment))
        return TokenGuess(made.ids[order], made.weights[order])

    return guess


class Popularity:
    """The experts that each layer routed most tokens to so far, in the text that is scored and in `counts`.

    Args:
        counts: per MoE layer [experts], from calibration; zeros where nothing is known.
    """

    def __init__(self, counts: Sequence[torch.Tensor]) -> None:
        self._counts = [layer.clone() for layer in counts]

    def __call__(self, moment: Moment, width: int) -> TokenGuess:
        """See `Guesser`."""
        best = torch.topk(self._counts[moment.layer], min(width, moment.num_experts)).indices
        return _equal_weights(best.expand(len(moment.token_ids), -1))

    def learn(self, moment: Moment) -> None:
        """Count a moment, after all guesses for it have been made."""
        self._counts[moment.layer] += expert_counts(moment.now.ids, moment.num_experts)

    def scores(self, layer: int) -> torch.Tensor:
        """[experts], each expert's share of the routed, 0 to 1."""
        counts = self._counts[layer].float()
        return counts / counts.sum().clamp(min=1)


def previous_token(popularity: Popularity) -> Guesser:
    """What the layer chose for the token before; then, and for the first token of a row, what is popular."""

    def guess(moment: Moment, width: int) -> TokenGuess:
        scores = popularity.scores(moment.layer).expand(len(moment.token_ids), -1)
        # One column more takes the ids that are no expert.
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
    """[experts] int64: how often each expert was chosen; ids that are no expert are left out."""
    return torch.bincount(ids.flatten().clamp(max=num_experts), minlength=num_experts + 1)[:num_experts]


def _equal_weights(ids: torch.Tensor) -> TokenGuess:
    return TokenGuess(ids, torch.full(ids.shape, 1.0 / ids.shape[-1], dtype=torch.float32))


def _generator(seed: int, moment: Moment) -> torch.Generator:
    """Of its own for each moment: the order in which predictors are asked changes no number."""
    return torch.Generator().manual_seed((seed * 1_000_003 + moment.pass_index) * 4099 + moment.layer)
