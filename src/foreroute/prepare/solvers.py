"""What is fitted in closed form from text: linear maps, layer 0's table and default vectors, from sums over its tokens.

The normal equations are added up while tokens pass; activations are never kept.
"""

import torch

from foreroute.predict.base import RouterSample
from foreroute.predict.fitted import RidgeLayer, TokenTable

# Rows converted to float64 at a time: bounds the temporaries to a few tens of MB for a hidden width of 2048.
_BLOCK_ROWS = 1024
# A variance of less than this share of a feature's mean square is rounding: the feature was constant.
_VARIANCE_FLOOR = 1e-12

# A token seen this often counts as much as the prediction from its embedding.
_PRIOR_COUNT = 1.0


class NormalEquations:
    """X^T X and X^T Y of a linear regression with a bias, accumulated row by row in float64.

    Memory: (features + 1) x (features + 1 + outputs) numbers; 40 MB for a hidden width of 2048 and 128 experts.
    """

    def __init__(self, num_features: int, num_outputs: int) -> None:
        # The last feature is the constant 1: it carries the sums and the number of rows.
        self.gram = torch.zeros(num_features + 1, num_features + 1, dtype=torch.float64)
        self.cross = torch.zeros(num_features + 1, num_outputs, dtype=torch.float64)

    @property
    def num_rows(self) -> int:
        """Rows added so far."""
        return int(self.gram[-1, -1])

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Add rows: `features` [rows, features], `targets` [rows, outputs]; any float dtype.

        Cost: rows x features^2 multiply-adds in float64.
        """
        for x, y in zip(features.split(_BLOCK_ROWS), targets.split(_BLOCK_ROWS), strict=True):
            rows = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
            self.gram.addmm_(rows.t(), rows)
            self.cross.addmm_(rows.t(), y.double())

    def solve(self, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The ridge solution: weights [features, outputs] and bias [outputs], float64. The bias is not penalised.

        Args:
            penalty: relative to each feature's own variance, so that the scale of a feature does not matter.
        Raises:
            ValueError: the sums are not finite.
        Memory: one float64 copy of the features' square.
        """
        assert self.num_rows > 0, "no row was added"
        sums, cross = self.gram[-1], self.cross
        count = sums[-1]
        mean_x, mean_y = sums[:-1] / count, cross[-1] / count
        # The one copy; it becomes the system in place.
        covariance = self.gram[:-1, :-1].clone().div_(count).addr_(mean_x, mean_x, alpha=-1)
        joint = cross[:-1] / count - torch.outer(mean_x, mean_y)
        variance = covariance.diagonal().clamp(min=0)  # a copy
        # Standardised: features that were constant get no weight, the others a unit diagonal.
        varies = variance > _VARIANCE_FLOOR * self.gram.diagonal()[:-1] / count
        scale = torch.where(varies, variance, 1.0).rsqrt() * varies
        system = covariance.mul_(scale[:, None]).mul_(scale)
        system.diagonal().fill_(1.0 + penalty)
        # Factored where it is: symmetric, so that its transpose has the order of memory that LAPACK works in.
        factor = system.mT
        failed_at = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(factor, out=(factor, failed_at))
        if int(failed_at):
            raise ValueError("the sums are not finite, or not those of any rows")
        half = torch.linalg.solve_triangular(factor, joint * scale[:, None], upper=False)
        weights = torch.linalg.solve_triangular(factor.mT, half, upper=True) * scale[:, None]
        return weights, mean_y - mean_x @ weights


def _gate_vector(seen: RouterSample, num_experts: int) -> torch.Tensor:
    """Gate weights of `seen` as a dense [tokens, num_experts] float32 tensor; ids outside the experts are left out."""
    dense = torch.zeros(seen.ids.shape[0], num_experts + 1, dtype=torch.float32)
    dense.scatter_add_(1, seen.ids.clamp(max=num_experts), seen.weights.float())
    return dense[:, :num_experts]


class RidgeFit:
    """Accumulates one layer's normal equations; `solve` gives its `RidgeLayer`.

    Args:
        num_experts: of this layer. num_targets: experts of the next one.
    """

    def __init__(self, hidden: int, num_experts: int, num_targets: int) -> None:
        self._hidden = hidden
        self._num_experts = num_experts
        self.equations = NormalEquations(hidden + num_experts, num_targets)

    def add(self, seen: RouterSample, targets: torch.Tensor) -> None:
        """Add tokens `seen` with `targets` [tokens, next experts]: the next router's logits on them."""
        features = torch.cat([seen.hidden.float(), _gate_vector(seen, self._num_experts)], 1)
        self.equations.add(features, targets)

    def solve(self, penalty: float) -> RidgeLayer:
        """Solve for the layer's map; see `NormalEquations.solve`."""
        weights, bias = self.equations.solve(penalty)
        gates = torch.cat([weights[self._hidden :], torch.zeros(1, weights.shape[1], dtype=torch.float64)])
        return RidgeLayer(weights[: self._hidden].float().contiguous(), gates.float(), bias.float())


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


class DefaultVectorSums:
    """Running sums of the outputs of one layer's experts; `means` gives the default vectors."""

    def __init__(self, num_experts: int, hidden: int) -> None:
        self.sums = torch.zeros(num_experts, hidden, dtype=torch.float64)
        self.counts = torch.zeros(num_experts, dtype=torch.int64)

    def add(self, expert: int, rows: torch.Tensor) -> None:
        """Add `rows` [tokens, hidden]: outputs of `expert` before its gate weights."""
        self.sums[expert] += rows.double().sum(0)
        self.counts[expert] += rows.shape[0]

    def means(self) -> torch.Tensor:
        """The default vectors [experts, hidden], float32; zero for an expert that no token selected."""
        return (self.sums / self.counts.clamp(min=1)[:, None]).float()
