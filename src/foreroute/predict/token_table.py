"""Layer 0 has no layer before it: its experts are guessed from the token alone, by a table token -> logits."""

import torch

from foreroute.predict.base import TokenGuess, guess_from_scores
from foreroute.predict.ridge import NormalEquations

# A token seen so often is believed as much as what its embedding says.
_PRIOR_COUNT = 1.0


class TokenTable:
    """Scores of MoE layer 0's experts by token.

    Args:
        scores: [vocabulary, experts], any float dtype.
    """

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores

    def guess(self, token_ids: torch.Tensor, width: int) -> TokenGuess:
        """The guess for `token_ids` [tokens]. Cost: one row per token."""
        return guess_from_scores(self.scores[token_ids].float(), width)


class TokenTableFit:
    """Mean logits of layer 0 by token, leaning on a linear map from the token's embedding where few were seen.

    Memory: vocabulary x experts doubles (156 MB for 152k tokens and 128 experts), and the normal equations of the map.
    """

    def __init__(self, vocabulary: int, hidden: int, num_experts: int) -> None:
        self.sums = torch.zeros(vocabulary, num_experts, dtype=torch.float64)
        self.counts = torch.zeros(vocabulary, dtype=torch.int64)
        self.equations = NormalEquations(hidden, num_experts)

    def add(self, token_ids: torch.Tensor, embeddings: torch.Tensor, targets: torch.Tensor) -> None:
        """Add `token_ids` [tokens], their input `embeddings` [tokens, hidden], and layer 0's `targets`."""
        self.sums.index_add_(0, token_ids, targets.double())
        self.counts += torch.bincount(token_ids, minlength=len(self.counts))
        self.equations.add(embeddings, targets)

    def solve(self, embeddings: torch.Tensor, penalty: float) -> torch.Tensor:
        """The table [vocabulary, experts] float16, for the input `embeddings` [vocabulary, hidden] of all tokens."""
        weights, bias = self.equations.solve(penalty)
        table = torch.empty(self.sums.shape, dtype=torch.float16)
        for start in range(0, len(table), 4096):
            rows = slice(start, start + 4096)
            prior = embeddings[rows].double() @ weights + bias
            counts = self.counts[rows, None]
            table[rows] = ((self.sums[rows] + _PRIOR_COUNT * prior) / (counts + _PRIOR_COUNT)).half()
        return table
