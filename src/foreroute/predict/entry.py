"""A MoE layer's experts from the residual stream before its own attention: a later guess than the others, and a better.

It comes when the layer begins, so that only that layer's attention hides the copies.
"""

from dataclasses import dataclass

import torch

from foreroute.predict.base import Select, TokenGuess, guess_from_scores
from foreroute.predict.ridge import NormalEquations

_EPSILON = 1e-6


def normalised(entry: torch.Tensor) -> torch.Tensor:
    """`entry` [tokens, hidden] scaled to a root mean square of 1 per token, float32."""
    rows = entry.float()
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + _EPSILON)


@dataclass(frozen=True)
class EntryLayer:
    """The linear guess of one MoE layer: weights [hidden, experts] and bias [experts], float32."""

    weights: torch.Tensor
    bias: torch.Tensor

    def guess(self, entry: torch.Tensor, width: int, select: Select = guess_from_scores) -> TokenGuess:
        """At most `width` experts per token, for the residual stream `entry` [tokens, hidden] before the attention.

        Cost: one [tokens, hidden] x [hidden, experts] product in fp32.
        """
        return select(torch.addmm(self.bias, normalised(entry), self.weights), width)


class EntryFit:
    """Collects one layer's normal equations. Memory: (hidden + 1) x (hidden + 1 + experts) doubles."""

    def __init__(self, hidden: int, num_experts: int) -> None:
        self.equations = NormalEquations(hidden, num_experts)

    def add(self, entry: torch.Tensor, targets: torch.Tensor) -> None:
        """`entry` [tokens, hidden], `targets` [tokens, experts]: the layer's gate logits on the same tokens."""
        self.equations.add(normalised(entry), targets)

    def solve(self, penalty: float) -> EntryLayer | None:
        """The layer's guess; None when nothing was added. See `NormalEquations.solve`."""
        if not self.equations.num_rows:
            return None
        weights, bias = self.equations.solve(penalty)
        return EntryLayer(weights.float().contiguous(), bias.float())
