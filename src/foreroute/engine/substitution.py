"""A MoE layer's step under a policy that does not wait for everything: what is fetched early, and what stands in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from foreroute.predict.base import Seen, most_wanted
from foreroute.residency.slots import LOADING, READY

if TYPE_CHECKING:
    from foreroute.engine.approximation import Approximation
    from foreroute.engine.combine import DecodeStep
    from foreroute.engine.moe_step import Runtime


class StandingIn:
    """Around the experts that are waited for: `prefetch_next` before, `at_last` after they are computed.

    Args:
        absent: keys of the layer that are neither there nor waited for. seen: what the layer executes.
    """

    def __init__(
        self,
        runtime: Runtime,
        layer: int,
        absent: Sequence[int],
        step: DecodeStep,
        approximation: Approximation,
        seen: Seen,
    ) -> None:
        self._runtime = runtime
        self._layer = layer
        self._absent = absent
        self._step = step
        self._approximation = approximation
        self._seen = seen

    def prefetch_next(self) -> None:
        """Queue the guess of the next layer; under `paper` it is also its route."""
        runtime, following = self._runtime, self._layer + 1
        route = self._approximation.see(self._layer, *self._seen[:3])
        if route is None:
            runtime.ahead.guess_next(self._layer, *self._seen[:3])
        elif runtime.ahead.lacks(following):
            num_experts = runtime.table.layers[following].num_experts
            runtime.ahead.prefetch(following, most_wanted(route.ids, num_experts), runtime.phase)

    def at_last(self) -> list[int]:
        """Default vectors stand in for what is absent still, which is read later; returns what was leased.

        What arrived while others were computed is used after all: it cost no wait.
        """
        arrived = self._run_arrived()
        missing = [key for key in self._absent if key not in arrived]
        if missing:
            runtime, base = self._runtime, self._layer * self._runtime.table.num_experts
            self._step.stand_in(missing, self._approximation.vectors(self._layer, [key - base for key in missing]))
            runtime.phase.stood_in += len(missing)
            if runtime.tracing is not None:
                runtime.tracing.stood_in += missing
            if runtime.keeps_across_tokens:
                runtime.ahead.fill(self._layer, missing, runtime.phase)
        return arrived

    def _run_arrived(self) -> list[int]:
        runtime, arrived = self._runtime, list[int]()
        residency = runtime.residency
        while True:
            rest = [key for key in self._absent if key not in arrived]
            if any(residency.state(key) == LOADING for key in rest):
                runtime.settle(runtime.transfer.completed())
            there = [key for key in rest if residency.state(key) == READY]
            if not there:
                return arrived
            for key in there:
                residency.lease(key)
            self._step.run(there)
            runtime.phase.hits += len(there)
            if runtime.tracing is not None:
                runtime.tracing.hits += there
            arrived += there
