"""Record the routes of a run, and predict them without error: what prefetch gains with perfect predictions."""

from collections.abc import Sequence

import torch

from foreroute.predict.base import most_wanted

# Per forward pass, per MoE layer: the distinct experts routed to, most used first.
Routes = list[list[list[int]]]


class RouteRecorder:
    """Keep every layer's routing: an observer, called with layer, hidden [tokens, hidden], ids and weights [tokens, k].

    Args:
        num_experts: per MoE layer; ids at or above it are padding.
    Cost: one copy to the host per layer, so do not time a run that it watches.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._num_experts = num_experts
        self.routes: Routes = []

    def __call__(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        if layer == 0:
            self.routes.append([[] for _ in self._num_experts])
        self.routes[-1][layer] = most_wanted(ids, self._num_experts[layer])


class Oracle:
    """A predictor that is never wrong: it reads recorded routes, one MoE layer ahead as real predictors do.

    `follow` sets the run that comes next. Passes are counted at layer 0's router, which every pass runs.
    """

    def __init__(self) -> None:
        self._routes: Routes = []
        self._pass = -1

    def follow(self, routes: Routes) -> None:
        """Predict `routes` from the next pass on."""
        self._routes = routes
        self._pass = -1

    def guess(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Sequence[int]:
        """Experts of MoE layer `layer + 1`; hidden [tokens, hidden], ids and weights [tokens, k] are ignored."""
        return self._of(self._pass, layer + 1)

    def guess_first(self, token_ids: torch.Tensor, num_rows: int | None = None) -> Sequence[int]:
        """Experts of MoE layer 0 in the pass that begins; token_ids [tokens] are ignored."""
        return self._of(self._pass + 1, 0)

    def see_first(self, hidden: torch.Tensor, num_rows: int, *, goes_on: bool = False) -> None:
        """Count a pass that has reached layer 0; hidden [tokens, hidden] and num_rows are ignored."""
        self._pass += 1

    def drop_last(self, count: int) -> None:
        """No token is drafted here."""

    def _of(self, at: int, layer: int) -> Sequence[int]:
        return self._routes[at][layer] if 0 <= at < len(self._routes) else ()
