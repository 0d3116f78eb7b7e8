"""Reads that nobody waits for: guesses of what the next layer will want, and fills with what was stood in for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from math import ceil
from typing import TYPE_CHECKING

import torch

from foreroute.predict.governor import Governor

if TYPE_CHECKING:
    from foreroute.engine.moe_step import Runtime
    from foreroute.engine.stats import PhaseStats


class ReadsAhead:
    """Queues such reads, takes back guesses that a router contradicted, and books what became of them."""

    def __init__(
        self, runtime: Runtime, governor: Governor | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._runtime = runtime
        # One for each number of rows: steps of other batches take other times.
        self.governor = governor
        self._governors: dict[int, Governor] = {}
        self._clock = clock
        self._step_began_s = self._stalled_before_s = 0.0
        self._num_experts = runtime.table.num_experts
        self._widths = [layer.num_experts for layer in runtime.table.layers]
        self._key_nbytes = runtime.key_nbytes
        # Guesses for a layer that were queued and that its router has not confirmed or contradicted yet.
        self._guessed: list[list[int]] = [[] for _ in self._widths]
        # Used and wasted guesses, as the pool had counted them when they were last booked to a phase.
        self._booked = (0, 0)
        # Experts that were stood in for, and not filled since.
        self._stood_in: set[int] = set()
        # Of those that are being filled, the ones that were queued here for it: the others were guesses that came late.
        self._queued_fills: set[int] = set()

    def lacks(self, layer: int) -> bool:
        """Some expert of the layer is neither there nor on its way, and a guess could bring it."""
        residency = self._runtime.residency
        return residency.staging_slots > 0 and residency.resident_per_layer[layer] < self._widths[layer]

    def begin_step(self, num_rows: int, token_ids: torch.Tensor | None) -> None:
        """A step of so many rows begins; its `token_ids` [rows, 1] guess the first layer. None: a prompt, or no ids."""
        runtime = self._runtime
        if self.governor is not None:
            if num_rows not in self._governors:
                self._governors[num_rows] = self.governor.fresh() if self._governors else self.governor
            self.governor = self._governors[num_rows]
            if runtime.is_prefill:
                self.governor.pause()
            self._step_began_s, self._stalled_before_s = self._clock(), runtime.phase.stall_s
            runtime.phase.unguessed_steps += not self.share
            if runtime.learner is not None and not runtime.is_prefill:
                # What learning costs belongs to the guesses that it is for.
                (runtime.learner.resume if self.share else runtime.learner.pause)()
        if token_ids is not None and runtime.predictor is not None and self.share and self.lacks(0):
            self.prefetch(0, runtime.predictor.guess_first(token_ids.flatten()), runtime.phase)

    def guess_next(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """The layer after `layer` is guessed from what its router saw and said. Arguments as of `Predictor`."""
        predictor, following = self._runtime.predictor, layer + 1
        if predictor is not None and following < len(self._widths) and self.share and self.lacks(following):
            self.prefetch(following, predictor.guess(layer, hidden, ids, weights), self._runtime.phase)

    def end_step(self) -> None:
        """The last layer has been computed: what the step took is the governor's measure."""
        governor, runtime = self.governor, self._runtime
        if governor is None or not self._is_governed or runtime.residency.num_free > runtime.residency.staging_slots:
            # While the pool fills, steps take less time each time, whoever guesses.
            return
        waited_s = runtime.phase.stall_s - self._stalled_before_s
        if governor.step(self._clock() - self._step_began_s, waited_s) and runtime.tracing is not None:
            runtime.tracing.governor(governor.share, "trial" if governor.is_trying else governor.why)

    @property
    def share(self) -> float:
        """Of the full width, what is guessed now: the governor's choice where guesses only fetch early, else all."""
        return self.governor.share if self.governor is not None and self._is_governed else 1.0

    @property
    def _is_governed(self) -> bool:
        runtime = self._runtime
        return not runtime.is_prefill and (runtime.approximation is None or runtime.approximation.is_exact)

    def prefetch(self, layer: int, experts: Sequence[int], phase: PhaseStats) -> None:
        """Queue those of the guessed experts, best first, that are not there."""
        experts = experts[: ceil(len(experts) * self.share)]
        if self._runtime.tracing is not None:
            self._runtime.tracing.guess(layer, experts)
        base = layer * self._num_experts
        loads = self._runtime.residency.prefetch([base + expert for expert in experts])
        for key, slot in loads:
            self._runtime.transfer.prefetch(key, slot)
        self._guessed[layer].extend(key for key, _ in loads)
        phase.prefetch_loads += len(loads)
        phase.prefetch_bytes += sum(self._key_nbytes[key] for key, _ in loads)

    def fill(self, layer: int, keys: Sequence[int], phase: PhaseStats) -> None:
        """Read what was stood in for all the same, when there is time: else it might never be there.

        Its second time, not its first: that halves these reads, and costs little, as guesses bring most that recur.
        """
        again = [key for key in keys if key in self._stood_in]
        self._stood_in.update(keys)
        if not again:
            return
        # Those for which there is no room now keep their turn.
        loads = self._runtime.residency.fill(again)
        self._stood_in.difference_update(key for key, _ in loads)
        if self._runtime.tracing is not None:
            self._runtime.tracing.filled([key for key, _ in loads])
        self._queued_fills = {key for key in self._queued_fills if key in self._runtime.residency.filling}
        for key, slot in loads:
            self._runtime.transfer.fill(key, slot)
            self._queued_fills.add(key)
        phase.fill_loads += len(loads)
        phase.fill_bytes += sum(self._key_nbytes[key] for key, _ in loads)

    def drop_contradicted(self, layer: int, wanted: Collection[int], phase: PhaseStats) -> None:
        """Queued guesses for this layer that its router did not confirm are taken back."""
        guessed = self._guessed[layer]
        for key in guessed:
            if key not in wanted and self._runtime.transfer.cancel(key):
                self._runtime.residency.cancel(key)
                phase.prefetch_cancelled += 1
                phase.prefetch_loads -= 1
                phase.prefetch_bytes -= self._key_nbytes[key]
        guessed.clear()

    def drop_all(self, phase: PhaseStats) -> None:
        """Everything that is queued, and that nobody waits for, is taken back."""
        for layer in range(len(self._guessed)):
            self.drop_contradicted(layer, (), phase)
        for key in list(self._runtime.residency.filling):
            if self._runtime.transfer.cancel(key):
                self._runtime.residency.cancel(key)
                self._stood_in.add(key)
                nbytes = self._key_nbytes[key]
                if key in self._queued_fills:
                    phase.fill_loads -= 1
                    phase.fill_bytes -= nbytes
                else:
                    phase.prefetch_loads -= 1
                    phase.prefetch_bytes -= nbytes

    def book(self, phase: PhaseStats) -> None:
        """What became of guesses since the last call goes to the phase that runs."""
        residency = self._runtime.residency
        used, wasted = residency.prefetch_used, residency.prefetch_wasted
        phase.prefetch_used += used - self._booked[0]
        phase.prefetch_wasted += wasted - self._booked[1]
        self._booked = (used, wasted)

    def forget(self) -> None:
        """All guesses are gone, with the pool that they were for."""
        for guessed in self._guessed:
            guessed.clear()
        self._stood_in.clear()
        self._queued_fills.clear()
