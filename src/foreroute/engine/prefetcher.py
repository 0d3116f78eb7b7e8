"""Prefetch experts of the next layer: those the predictor guesses, as many as the governor allows."""

from collections.abc import Sequence
from math import ceil

import torch

from foreroute.engine.approximation import Approximation
from foreroute.engine.interfaces import PrefetchSource, StepInfo
from foreroute.engine.pool import ExpertPool
from foreroute.predict.base import most_wanted
from foreroute.predict.governor import Governor


class Prefetcher:
    """Ask the predictor one layer ahead and queue prefetches of its guess, as many as the governor allows.

    Args:
        predictor: None prefetches nothing.
        policies: only exact is governed: under others prefetches decide what is resident, and so the output.
        governor: None always prefetches the whole guess.
        first_layer: the first MoE layer of a decode step; those before it are an encoder's, whose hidden states say
            nothing about it.

    Attributes:
        share: current share of the full width that is prefetched, 0 to 1. first_layer: as above.
    """

    def __init__(
        self,
        pool: ExpertPool,
        predictor: PrefetchSource | None,
        policies: Approximation,
        *,
        governor: Governor | None = None,
        first_layer: int = 0,
    ) -> None:
        self.first_layer = first_layer
        self.predictor = predictor
        self.governor = governor
        self.share = 1.0 if governor is None else governor.share
        self._pool = pool
        self._policies = policies
        self._num_layers = len(pool.keys.widths)
        # One per number of rows, as step times differ by batch size.
        self._governors: dict[int, Governor] = {}
        self._is_governed = False
        self._began_s = self._stalled_before_s = 0.0

    def begin_step(self, info: StepInfo) -> None:
        """Choose the step's share, and in decode prefetch for the first layer from its tokens."""
        self._is_governed = self.governor is not None and info.phase == "decode" and self._policies.is_exact
        self.share = 1.0
        if self.governor is not None:
            self._begin_governed(self.governor, info)
        if info.num_dropped and self.predictor is not None:
            self.predictor.drop_last(info.num_dropped)
        if not info.is_prefill and info.token_ids is not None:
            self.guess_first(info.token_ids.flatten(), info.num_rows)

    def _begin_governed(self, governor: Governor, info: StepInfo) -> None:
        if info.num_rows not in self._governors:
            self._governors[info.num_rows] = governor.fresh() if self._governors else governor
        self.governor = governor = self._governors[info.num_rows]
        if self._is_governed:
            self.share = governor.share
        elif info.phase == "verify" and self._policies.is_exact:
            # Its time depends on how many tokens were drafted: what decode steps have decided holds.
            self.share = governor.chosen
        if not self._is_governed:
            governor.pause()
        self._began_s, self._stalled_before_s = self._pool.clock(), self._pool.phase.stall_s
        if not self.share:
            self._pool.count_step_without_prefetch()

    def guess_first(self, token_ids: torch.Tensor, num_rows: int) -> None:
        """Prefetch for the first layer from the tokens [num_rows x positions] of a step."""
        first = self.first_layer
        if self.predictor is None or not self.share or first >= self._num_layers:
            return
        if self._pool.can_prefetch(first):
            self.prefetch(first, self.predictor.guess_first(token_ids, num_rows))

    def see_first(self, hidden: torch.Tensor, num_rows: int, *, goes_on: bool = False) -> None:
        """Pass the predictor the first layer's router input `hidden` [num_rows x positions, hidden], a context."""
        if self.predictor is not None:
            self.predictor.see_first(hidden, num_rows, goes_on=goes_on)

    def guess_next(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Prefetch for `layer + 1` from this layer's routing: hidden [tokens, hidden], ids, weights [tokens, k]."""
        predictor, following = self.predictor, layer + 1
        if predictor is None or following in (self._num_layers, self.first_layer) or not self.share:
            return
        if self._pool.can_prefetch(following):
            self.prefetch(following, predictor.guess(layer, hidden, ids, weights))

    def prefetch_route(self, layer: int, ids: torch.Tensor) -> None:
        """Prefetch `layer`'s experts `ids` [tokens, width], best first, whose route is known."""
        if self._pool.can_prefetch(layer):
            self.prefetch(layer, most_wanted(ids, self._pool.keys.widths[layer]))

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Queue prefetches of `layer`'s guessed `experts` (best first) that are absent, within the current share."""
        self._pool.prefetch(layer, experts[: ceil(len(experts) * self.share)])

    def end_step(self) -> None:
        """Report the step's time to the governor, after the last layer."""
        governor, pool = self.governor, self._pool
        if governor is None or not self._is_governed or pool.residency.num_free > pool.residency.staging_slots:
            # While the pool fills, steps get faster with or without prefetch.
            return
        waited_s = pool.phase.stall_s - self._stalled_before_s
        if governor.step(pool.clock() - self._began_s, waited_s):
            self.share = governor.share
            pool.governed(governor.share, "trial" if governor.is_trying else governor.why)
