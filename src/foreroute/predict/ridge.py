"""A linear predictor per layer, and its solver: [router input, gate weights] -> the next router's logits.

Its inputs carry as much as the paper's quasi-hidden state, and need neither the residual nor the norms.
The normal equations are added up while tokens pass; activations are never kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foreroute.predict.base import RouterSample, Select, TokenGuess, guess_from_scores
from foreroute.predict.default_vector import weighted_rows

# Rows converted to float64 at a time: bounds the temporaries to a few tens of MB for a hidden width of 2048.
_BLOCK_ROWS = 1024
# A variance of less than this share of a feature's mean square is rounding: the feature was constant.
_VARIANCE_FLOOR = 1e-12


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


@dataclass(frozen=True)
class RidgeLayer:
    """A linear map from one MoE layer to the next, all float32.

    from_hidden: [hidden, next experts]. from_gates: [experts + 1, next experts]; its last row is zero, for ids outside
    the layer's experts. bias: [next experts].
    """

    from_hidden: torch.Tensor
    from_gates: torch.Tensor
    bias: torch.Tensor

    def scores(self, seen: RouterSample) -> torch.Tensor:
        """Scores [tokens, next experts], higher is likelier."""
        scores = torch.addmm(self.bias, seen.hidden.float(), self.from_hidden)
        return scores.add_(weighted_rows(self.from_gates, seen))


class Ridge:
    """Predicts with one linear map per layer.

    Args:
        layers: per MoE layer; None where none was fitted.
        selects: per MoE layer, how scores of the next one are read; the best scores when left out.
    """

    def __init__(self, layers: Sequence[RidgeLayer | None], selects: Sequence[Select] | None = None) -> None:
        self._layers = list(layers)
        self._selects = selects or [guess_from_scores] * len(self._layers)

    def guess(self, layer: int, seen: RouterSample, width: int) -> TokenGuess | None:
        """See `Predictor`. Cost: one [tokens, hidden] x [hidden, experts] product in fp32."""
        entry = self._layers[layer] if layer < len(self._layers) else None
        return None if entry is None else self._selects[layer](entry.scores(seen), width)


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
