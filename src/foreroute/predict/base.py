"""The protocol of all predictors: from what a MoE layer knows to the experts that the next one is likely to use."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

# Up to this many votes, counting in Python is quicker than the tensor calls that count.
_FEW_VOTES = 256


class RouterSample(NamedTuple):
    """Router input, choice and optional residual of one MoE layer: all that a predictor may read.

    hidden: [tokens, hidden], the router's input. ids: [tokens, k] int64. weights: [tokens, k] gate weights.
    residual: [tokens, hidden], the residual stream after this layer's attention; None where it is not known.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    residual: torch.Tensor | None = None

    def first_token(self) -> "RouterSample":
        """A copy of the first token's sample."""
        residual = None if self.residual is None else self.residual[:1].clone()
        return RouterSample(self.hidden[:1].clone(), self.ids[:1].clone(), self.weights[:1].clone(), residual)


class TokenGuess(NamedTuple):
    """The experts predicted for each token, best first.

    ids: [tokens, width] int64; ids outside the layer's experts are ignored.
    weights: [tokens, width], their predicted gate weights.
    """

    ids: torch.Tensor
    weights: torch.Tensor


# (scores [tokens, experts], higher is likelier; width) -> the guess that the scores stand for.
Select = Callable[[torch.Tensor, int], TokenGuess]


class Predictor(Protocol):
    """Predicts the experts of MoE layer `layer + 1` from what layer `layer` saw. Batched; no read-back to the host."""

    def guess(self, layer: int, seen: RouterSample, width: int) -> TokenGuess | None:
        """Guess MoE layer `layer + 1` from `seen` at `layer`: at most `width` experts per token, or None."""


def guess_from_scores(scores: torch.Tensor, width: int) -> TokenGuess:
    """Take the `width` best of `scores` [tokens, experts], weighted by their softmax among themselves."""
    best = torch.topk(scores, min(width, scores.shape[-1]))
    return TokenGuess(best.indices, torch.softmax(best.values, -1))


def most_wanted(ids: torch.Tensor, num_experts: int) -> list[int]:
    """Merge several tokens' guesses into distinct experts, most wanted first: a token's vote counts by its rank.

    Args:
        ids: [tokens, width], best first; ids of `num_experts` or above are left out.
    Cost: one read-back.
    """
    if len(ids) == 1:
        return list(dict.fromkeys(expert for expert in ids[0].tolist() if expert < num_experts))
    width = ids.shape[1]
    if ids.numel() <= _FEW_VOTES:
        counted: dict[int, int] = {}
        for row in ids.tolist():
            for rank, expert in enumerate(row):
                counted[expert] = counted.get(expert, 0) + width - rank
        wanted = [(-vote, expert) for expert, vote in counted.items() if expert < num_experts]
        return [expert for _, expert in sorted(wanted)]
    rank_votes = torch.arange(width, 0, -1, device=ids.device).expand(len(ids), -1)
    votes = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    votes.scatter_add_(0, ids.clamp(max=num_experts).flatten(), rank_votes.flatten())
    ordered = votes[:num_experts].sort(descending=True, stable=True)
    return ordered.indices[: int((ordered.values > 0).sum())].tolist()
