"""The routes of a run, and the predictor that knows them: what prefetch would be worth if no guess were wrong."""

from collections.abc import Sequence

import torch

from foreroute.predict.base import most_wanted

# Per forward pass, per MoE layer: the distinct experts routed to, the most wanted first.
Routes = list[list[list[int]]]


class RouteRecorder:
    """An observer that keeps every layer's routing.

    Args:
        num_experts: per MoE layer; ids at or above it are no experts.
    Cost: one read-back per layer, so that no time is taken while it watches.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._num_experts = num_experts
        self.routes: Routes = []

    def __call__(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        if layer == 0:
            self.routes.append([[] for _ in self._num_experts])
        self.routes[-1][layer] = most_wanted(ids, self._num_experts[layer])


class Oracle:
    """A predictor that is never wrong, as it was told; still one MoE layer ahead and no more.

    `follow` says which run comes next. Passes are counted by layer 0's router, which every pass asks.
    """

    def __init__(self) -> None:
        self._routes: Routes = []
        self._pass = -1

    def follow(self, routes: Routes) -> None:
        """The next pass is the first one of `routes`."""
        self._routes = routes
        self._pass = -1

    def guess(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Sequence[int]:
        """MoE layer `layer + 1` of the pass at hand."""
        return self._of(self._pass, layer + 1)

    def guess_first(self, token_ids: torch.Tensor) -> Sequence[int]:
        """MoE layer 0 of the pass that begins."""
        return self._of(self._pass + 1, 0)

    def see_first(self, hidden: torch.Tensor, num_rows: int) -> None:
        """A pass has reached layer 0."""
        self._pass += 1

    def _of(self, at: int, layer: int) -> Sequence[int]:
        return self._routes[at][layer] if 0 <= at < len(self._routes) else ()
