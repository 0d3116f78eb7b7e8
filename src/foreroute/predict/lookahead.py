"""Predict the next layer's experts by running its router early.

Either on this layer's router input, or on the quasi-hidden state: the residual plus the experts' default vectors, as
the paper does (arXiv 2603.19289).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from foreroute.predict.base import RouterSample, TokenGuess


@dataclass(frozen=True)
class NextRouter:
    """A MoE layer's router, ready to be run ahead.

    route: router input [tokens, hidden] -> the router's outputs; None where it cannot run at the moment.
    ids_at, weights_at: positions of the expert ids and gate weights [tokens, k] among them. logits_at: of the gate
        logits [tokens, >= E], or -1.
    scale: [hidden]: turns the previous layer's router input into what this layer's norm would make of the same
        residual: this norm's weight over that one's. None where the norms are not known.
    is_sorted: the router's choice comes best first.
    """

    route: Callable[[torch.Tensor], tuple[torch.Tensor, ...] | None]
    ids_at: int
    weights_at: int
    logits_at: int
    num_experts: int
    scale: torch.Tensor | None
    is_sorted: bool = False

    def guess(self, router_input: torch.Tensor, width: int) -> TokenGuess | None:
        """Run the router on `router_input` [tokens, hidden]; its choice, cut or extended to `width` experts.

        The router's own selection rule comes first, groups and corrections included; only experts beyond its top-k are
        ranked by plain logits, and weighted by their softmax.
        """
        outputs = self.route(router_input)
        if outputs is None:
            return None
        ids, weights = outputs[self.ids_at], outputs[self.weights_at]
        if not self.is_sorted:
            weights, order = weights.sort(-1, descending=True)
            ids = ids.gather(-1, order)
        top_k = ids.shape[-1]
        if width == top_k:
            return TokenGuess(ids, weights)
        width = min(width, self.num_experts)
        if width <= top_k or self.logits_at < 0:
            return TokenGuess(ids[:, :width], weights[:, :width])
        logits = outputs[self.logits_at][:, : self.num_experts]
        ranked = torch.topk(logits, min(width + top_k, self.num_experts)).indices
        is_chosen = (ranked[:, :, None] == ids[:, None, :]).any(-1)
        others = ranked.gather(-1, is_chosen.int().argsort(dim=-1, stable=True))[:, : width - top_k]
        both = torch.cat([ids, others], -1)
        shares = torch.softmax(logits.gather(-1, both).float(), -1)[:, top_k:]
        return TokenGuess(both, torch.cat([weights, (shares * weights.sum(-1, keepdim=True)).to(weights.dtype)], -1))


class RouterLookahead:
    """The next router on this layer's router input (arXiv 2603.19289, without its default vectors).

    Scaled by the two norms' weights, that input is what the next norm makes of the residual after this layer's
    attention, so that this is the next router on that residual.

    Args:
        following: per MoE layer, the router of the next one; None where it cannot be run ahead.
        inputs: by MoE layer, its router's input [tokens, width], where it differs from the experts' input.
    """

    def __init__(
        self,
        following: Sequence[NextRouter | None],
        inputs: Mapping[int, Callable[[], torch.Tensor | None]] | None = None,
    ) -> None:
        self._following = list(following)
        self._inputs = dict(inputs or {})

    def guess(self, layer: int, seen: RouterSample, width: int) -> TokenGuess | None:
        """See `Predictor`. Cost: one [tokens, hidden] x [hidden, experts] product."""
        following = self._following[layer] if layer < len(self._following) else None
        if following is None:
            return None
        read = self._inputs.get(layer)
        hidden = seen.hidden if read is None else read()
        if hidden is None or len(hidden) != len(seen.hidden):
            return None  # the saved input is of another step
        return following.guess(hidden if following.scale is None else hidden * following.scale, width)


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
