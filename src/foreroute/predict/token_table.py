"""Predict layer 0's experts, which no layer precedes, from the token (a table token -> logits) and its context.

The context of a token is the router input of layer 0 at the tokens before it, the recent ones most: its attention mixes
something like it into the router's input. Both are known before the step begins.
"""

from dataclasses import dataclass

import torch

from foreroute.predict.base import Select, TokenGuess, guess_from_scores
from foreroute.predict.ridge import NormalEquations

# A token seen this often counts as much as the prediction from its embedding.
_PRIOR_COUNT = 1.0
# Weight of a token in the context, relative to the one after it.
_DECAY = 0.8
# Older ones count less than a millionth.
_MOST_POSITIONS = 64


def context_before(hidden: torch.Tensor) -> torch.Tensor:
    """The context of every position of a prompt: [rows, positions, width] float32; zero for the first.

    Args:
        hidden: [rows, positions, width], the router's input of layer 0.
    """
    num_positions = hidden.shape[1]
    age = torch.arange(num_positions)[:, None] - 1 - torch.arange(num_positions)
    share = torch.where(age >= 0, (1 - _DECAY) * _DECAY ** age.clamp(min=0).float(), 0.0)
    return share @ hidden.float()


class RunningContext:
    """The context of each row's next token during decoding."""

    def __init__(self) -> None:
        self._rows: torch.Tensor | None = None

    def see(self, hidden: torch.Tensor, num_rows: int) -> None:
        """Add layer 0's router input `hidden` [num_rows x positions, width] of a step; several positions start a text.

        If the tokens are not a whole number of positions per row, the call is another one and the context is unknown.
        """
        if len(hidden) % num_rows:
            self._rows = None
            return
        rows = hidden.detach().view(num_rows, -1, hidden.shape[-1]).float()
        if rows.shape[1] > 1 or self._rows is None or len(self._rows) != num_rows:
            self._rows = (
                torch.zeros_like(rows[:, 0])
                if rows.shape[1] == 1
                else context_before(rows[:, -_MOST_POSITIONS:])[:, -1]
            )
        self._rows = torch.lerp(rows[:, -1], self._rows, _DECAY)

    def of_rows(self, num_rows: int) -> torch.Tensor | None:
        """The context [rows, width]; None unless the last step had `num_rows` rows."""
        return self._rows if self._rows is not None and len(self._rows) == num_rows else None


@dataclass(frozen=True)
class TokenTable:
    """Scores MoE layer 0's experts by token and context.

    scores: [vocabulary, experts], any float dtype: by token, in the contexts in which it was seen.
    from_context: [width, experts] float32: added for the difference between a context and mean_context [width], the
    mean over all tokens. A token whose own contexts are unlike others' is shifted by that difference twice: sums of
    contexts by token would correct it, and take vocabulary x width numbers.
    """

    scores: torch.Tensor
    from_context: torch.Tensor
    mean_context: torch.Tensor

    def guess(
        self, token_ids: torch.Tensor, context: torch.Tensor | None, width: int, select: Select = guess_from_scores
    ) -> TokenGuess:
        """Predict for `token_ids` [tokens] in `context` [tokens, width] (None: the mean); `select` reads the scores.

        Cost: one row per token, and one [tokens, width] x [width, experts] product in fp32.
        """
        scores = self.scores[token_ids].float()
        if context is not None:
            scores = torch.addmm(scores, context - self.mean_context, self.from_context)
        return select(scores, width)


class TokenTableFit:
    """Mean logits of layer 0 by token, shrunk to a linear map of the token's embedding where few were seen.

    Memory: vocabulary x experts doubles (156 MB for 152k tokens and 128 experts), and the normal equations of a linear
    map from embedding and context (134 MB at widths of 2048).

    Args:
        embedding, hidden: widths of the token's embedding and of the context.
    """

    def __init__(self, vocabulary: int, embedding: int, hidden: int, num_experts: int) -> None:
        self._embedding = embedding
        self.sums = torch.zeros(vocabulary, num_experts, dtype=torch.float64)
        self.counts = torch.zeros(vocabulary, dtype=torch.int64)
        self.equations = NormalEquations(embedding + hidden, num_experts)

    def add(
        self, token_ids: torch.Tensor, embeddings: torch.Tensor, context: torch.Tensor, targets: torch.Tensor
    ) -> None:
        """Add `token_ids` [tokens], their `embeddings` and `context` [tokens, width], `targets` [tokens, experts]."""
        self.sums.index_add_(0, token_ids, targets.double())
        self.counts += torch.bincount(token_ids, minlength=len(self.counts))
        self.equations.add(torch.cat([embeddings.float(), context.float()], 1), targets)

    def solve(self, embeddings: torch.Tensor, penalty: float) -> TokenTable:
        """Solve for the float16 table: all tokens' `embeddings` [vocabulary, embedding], the ridge's `penalty`."""
        weights, bias = self.equations.solve(penalty)
        from_embedding, from_context = weights[: self._embedding], weights[self._embedding :]
        mean_context = self.equations.gram[-1, self._embedding : -1] / self.equations.num_rows
        bias = bias + mean_context @ from_context
        table = torch.empty(self.sums.shape, dtype=torch.float16)
        for start in range(0, len(table), 4096):
            rows = slice(start, start + 4096)
            prior = embeddings[rows].double() @ from_embedding + bias
            counts = self.counts[rows, None]
            table[rows] = ((self.sums[rows] + _PRIOR_COUNT * prior) / (counts + _PRIOR_COUNT)).half()
        return TokenTable(table, from_context.float().contiguous(), mean_context.float())
