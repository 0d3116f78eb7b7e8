"""Layer 0 has no layer before it: its experts are guessed from the token, by a table token -> logits, and the context.

The context of a token is what layer 0's router read at the tokens before it, the recent ones most: its attention mixes
something like it into what the router will read. Known before the step begins, as the table is.
"""

from dataclasses import dataclass

import torch

from foreroute.predict.base import Select, TokenGuess, guess_from_scores
from foreroute.predict.ridge import NormalEquations

# A token seen so often is believed as much as what its embedding says.
_PRIOR_COUNT = 1.0
# What a token counts in the context, beside the one after it.
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
    """The context of the next token of each row, while a text is decoded."""

    def __init__(self) -> None:
        self._rows: torch.Tensor | None = None

    def see(self, hidden: torch.Tensor, num_rows: int) -> None:
        """Layer 0's router input of a step, [rows x positions, width]; several positions are the start of a text.

        What is no whole number of positions for each row is of some other call, and is not known.
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
        """[rows, width]; None where nothing of so many rows was seen."""
        return self._rows if self._rows is not None and len(self._rows) == num_rows else None


@dataclass(frozen=True)
class TokenTable:
    """Scores of MoE layer 0's experts.

    scores: [vocabulary, experts], any float dtype, by token, in the contexts in which it was seen.
    from_context: [width, experts] float32, what a context adds to them as it differs from mean_context [width], that
    of all tokens. A token whose own contexts are unlike others' is shifted by that difference twice: sums of contexts
    by token would mend it, and take vocabulary x width numbers.
    """

    scores: torch.Tensor
    from_context: torch.Tensor
    mean_context: torch.Tensor

    def guess(
        self, token_ids: torch.Tensor, context: torch.Tensor | None, width: int, select: Select = guess_from_scores
    ) -> TokenGuess:
        """The guess for `token_ids` [tokens] in their `context` [tokens, width], or in a usual one.

        Cost: one row per token, and one [tokens, width] x [width, experts] product in fp32.
        """
        scores = self.scores[token_ids].float()
        if context is not None:
            scores = torch.addmm(scores, context - self.mean_context, self.from_context)
        return select(scores, width)


class TokenTableFit:
    """Mean logits of layer 0 by token, leaning on a linear map from the token's embedding where few were seen.

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
        """Add `token_ids` [tokens], their input `embeddings` and `context` [tokens, width], and layer 0's `targets`."""
        self.sums.index_add_(0, token_ids, targets.double())
        self.counts += torch.bincount(token_ids, minlength=len(self.counts))
        self.equations.add(torch.cat([embeddings.float(), context.float()], 1), targets)

    def solve(self, embeddings: torch.Tensor, penalty: float) -> TokenTable:
        """The table, float16, for the input `embeddings` [vocabulary, embedding] of all tokens."""
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
