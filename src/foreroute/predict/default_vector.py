"""The paper's predictor: the next router on the residual plus the experts' default vectors (arXiv 2603.19289)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from foreroute.predict.base import RouterSample, TokenGuess
from foreroute.predict.lookahead import NextRouter


@dataclass(frozen=True)
class QuasiHiddenLayer:
    """Forms the next layer's quasi-hidden state from one MoE layer.

    default_vectors: [experts + 1, hidden]: mean output of each expert over the calibration tokens that selected it,
        unweighted; zero for an expert never seen, and in the last row, for ids outside the layer's experts.
    next_norm: the norm in front of the next MoE block.
    """

    default_vectors: torch.Tensor
    next_norm: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, seen: RouterSample) -> torch.Tensor:
        """norm_{l+1}(r_l + sum of gate weight x default vector), [tokens, hidden]."""
        assert seen.residual is not None, "the residual is not captured"
        usual = weighted_rows(self.default_vectors, seen).to(seen.residual.dtype)
        return self.next_norm(seen.residual + usual)


class DefaultVectors:
    """Runs the next router on the quasi-hidden state.

    Args:
        layers: per MoE layer its quasi-hidden state; None where the residual is not known.
        routers: per MoE layer the next layer's router; None where it cannot be run ahead.
    """

    def __init__(self, layers: Sequence[QuasiHiddenLayer | None], routers: Sequence[NextRouter | None]) -> None:
        self._layers = list(zip(layers, routers, strict=True))

    def guess(self, layer: int, seen: RouterSample, width: int) -> TokenGuess | None:
        """See `Predictor`. Cost: k rows of [hidden], a norm and the router."""
        quasi_hidden, router = self._layers[layer] if layer < len(self._layers) else (None, None)
        if quasi_hidden is None or router is None:
            return None
        return router.guess(quasi_hidden(seen), width)


def with_no_expert(vectors: torch.Tensor) -> torch.Tensor:
    """Append a zero row to default vectors [experts, width], for ids outside the layer's experts."""
    return torch.cat([vectors, torch.zeros(1, vectors.shape[1], dtype=torch.float32)])


def weighted_rows(rows: torch.Tensor, seen: RouterSample) -> torch.Tensor:
    """Sum `rows` [experts + 1, width] over each token's experts in `seen`, by gate weight; other ids use the last row.

    Returns:
        [tokens, width]: the gate weights as a vector over the experts, times `rows`.
    """
    ids = seen.ids.clamp(max=rows.shape[0] - 1)
    return F.embedding_bag(ids, rows, per_sample_weights=seen.weights.to(rows.dtype), mode="sum")


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
