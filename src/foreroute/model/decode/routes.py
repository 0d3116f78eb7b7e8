"""How a MoE block chooses its experts, where that is a form that a graph computes; seen by numbers, never by name."""

from dataclasses import dataclass

import torch
from torch import nn

from foreroute.kernels.ggml.decoder.parts import Route
from foreroute.kernels.ggml.linear import RouterWeight
from foreroute.model.blocks import MoeLayer
from foreroute.model.decode.as_made import AsMade
from foreroute.model.experts import OffloadedExperts

_ROWS, _MOST_DIFFERENCE = 5, 1e-5


@dataclass(frozen=True)
class RoutedExperts:
    """A MoE block that passes its input to its experts, by a choice of the form `route`, and returns their sum.

    is_plain: whether the block is unchanged since that was seen, without hooks.
    """

    route: Route
    experts: OffloadedExperts
    is_plain: AsMade

    def __call__(self, normed: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute experts `ids`, weighted, [rows, k] each, of `normed` [rows, 1, width]: [rows, 1, width]."""
        compute = self.experts.engine_forward or self.experts  # closed experts raise what says so
        return compute(normed.flatten(0, 1), ids, weights).view_as(normed)


@torch.no_grad()
def routed_experts(block: nn.Module, layer: MoeLayer, weight: RouterWeight) -> RoutedExperts | None:
    """How `block`, the MoE block around `layer`'s experts, chooses; None where that is another form.

    Args:
        weight: of its router.
    """
    experts, num_experts, width = layer.experts, *weight.shape
    generator = torch.Generator().manual_seed(0)
    x, sums = (torch.randn(_ROWS, 1, width, generator=generator, dtype=torch.float32) for _ in range(2))
    given: list[tuple[torch.Tensor, ...]] = []

    def note(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        given.append((hidden, ids, weights))
        return sums.view(hidden.shape)

    own = experts.engine_forward
    experts.engine_forward = note
    try:
        out = block(x)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return None  # it wants other arguments, or other shapes
    finally:
        experts.engine_forward = own
    out = out[0] if isinstance(out, tuple) else out
    if len(given) != 1 or not isinstance(out, torch.Tensor) or not torch.equal(out, sums):
        return None
    hidden, ids, weights = given[0]
    if not torch.equal(hidden, x.view(_ROWS, width)) or ids.shape != (_ROWS, layer.top_k):
        return None
    biases = [one.detach().float() for one in block.parameters() if one.shape == (num_experts,)]
    for bias in (None, *biases):
        for is_share_of_all in (False, True):
            route = Route(layer.top_k, bias, is_share_of_all)
            if _is_alike(route, hidden, weight.detach(), ids, weights):
                return RoutedExperts(route, experts, AsMade(block.modules()))
    return None


def _is_alike(
    route: Route, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> bool:
    """Whether the route chooses `ids` by `weights` for these rows."""
    scores = hidden @ weight.as_subclass(torch.Tensor).t()
    scores = scores if route.bias is None else scores + route.bias
    if route.is_share_of_all:
        scores = scores.softmax(-1)
    best, ours = scores.topk(route.top_k)
    shares = best if route.is_share_of_all else best.softmax(-1)
    (ours, by_ours), (theirs, by_theirs) = ours.sort(-1), ids.sort(-1)
    differ = (shares.gather(-1, by_ours) - weights.float().gather(-1, by_theirs)).abs()
    return torch.equal(ours, theirs) and float(differ.max()) < _MOST_DIFFERENCE
