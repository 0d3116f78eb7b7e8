"""One MoE layer's step: what is there, what must come, what may be wanted next. Read `compute` first.

The decode path, per layer: read the routing back once, lease what is there, start loading what is missing, guess the
next layer's experts and queue them behind, compute the experts that are there while the others arrive, and add the
outputs up in ascending expert id, which is the order of transformers' eager experts and so gives its bits.
"""

import copy
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.engine.memory import SlotViews
from foreroute.engine.prefill import ExpertStream, group_by_expert
from foreroute.engine.stats import EngineStats, PhaseStats
from foreroute.kernels.cpu import Parts
from foreroute.residency.slots import LEASED, READY, Residency
from foreroute.transfer.base import Completion, Transfer

# [rows, hidden] and an expert's parts -> [rows, hidden], before the gate weight.
ExpertMathFn = Callable[[torch.Tensor, Parts], torch.Tensor]


class Predictor(Protocol):
    """Guesses the experts of the MoE layer after `layer` from what that layer's router reads."""

    def guess(self, layer: int, router_input: torch.Tensor) -> Sequence[int]:
        """Expert indices of MoE layer `layer + 1`, distinct, best first; empty when there is nothing to say.

        router_input: [tokens, hidden].
        """
        ...


class Runtime:
    """The engine of one loaded model: holds the parts and runs the step. Built by loader.py.

    Args:
        layer_widths: experts per MoE layer.
        family_forwards: per layer, the family's own forward over an ExpertStream where `math` could not be proven
            equal to it, else None.
        keep_across_tokens: False gives every expert up after its layer (on-demand loading).
    """

    def __init__(
        self,
        table: ExpertTable,
        residency: Residency,
        transfer: Transfer,
        views: SlotViews,
        math: Sequence[ExpertMathFn | None],
        family_forwards: Sequence[Callable[..., torch.Tensor] | None],
        predictor: Predictor | None,
        *,
        hits_first: bool = True,
        keep_across_tokens: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.table = table
        self.residency = residency
        self.transfer = transfer
        self.views = views
        self.stats = EngineStats()
        self._phase: PhaseStats = self.stats.decode
        self._math = math
        self._family_forwards = family_forwards
        self._predictor = predictor
        self._hits_first = hits_first
        self._keep_across_tokens = keep_across_tokens
        self._clock = clock
        self._num_experts = table.num_experts
        self._widths = [layer.num_experts for layer in table.layers]
        self._expert_bytes = [layer.layout.nbytes for layer in table.layers]
        self._guessed: list[list[int]] = [[] for _ in table.layers]
        self._is_prefill = False
        # A demand of a whole step must fit beside the guesses that are on their way.
        self._most_leased = residency.num_slots - residency.staging_slots

    def begin_step(self, num_rows: int, num_positions: int) -> None:
        """A forward pass of [num_rows, num_positions] tokens begins."""
        self._is_prefill = num_positions > 1
        self._phase = self.stats.prefill if self._is_prefill else self.stats.decode
        self._phase.steps += 1
        self._phase.tokens += num_rows * num_positions
        self.residency.tick()

    def compute(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The routed experts' weighted sum for MoE layer `layer`.

        Args:
            hidden: [tokens, hidden]; ids: [tokens, k] int64, those >= the number of experts are ignored;
            weights: [tokens, k].
        Returns:
            [tokens, hidden], in `hidden`'s dtype.
        Raises:
            ReadError, ChecksumError: an expert could not be read; the pool is consistent and the model usable.
        """
        width, base = self._widths[layer], layer * self._num_experts
        # The one read-back of the layer.
        routed = ids.tolist()
        keys = sorted({base + expert for row in routed for expert in row if expert < width})
        self._settle(self.transfer.completed() if self.transfer.num_in_flight else ())
        self._drop_contradicted(layer, keys)
        math = self._math[layer]
        if math is None or self._is_prefill or len(keys) > self._most_leased:
            return self._compute_streamed(layer, keys, hidden, ids, weights)
        return self._compute_leased(layer, keys, routed, hidden, weights, math)

    def close(self) -> None:
        """Stop the readers; the model's experts can no longer be computed."""
        self.transfer.close()

    def snapshot(self) -> EngineStats:
        """A copy of all counts since the model was loaded."""
        stats, residency = self.stats, self.residency
        stats.evictions = residency.evictions
        stats.prefetch_used, stats.prefetch_wasted = residency.prefetch_used, residency.prefetch_wasted
        stats.read_bytes, stats.read_s = self.transfer.bytes_read, self.transfer.busy_s
        return copy.deepcopy(stats)

    # Decode: everything of the step is leased at once.

    def _compute_leased(
        self,
        layer: int,
        keys: list[int],
        routed: list[list[int]],
        hidden: torch.Tensor,
        weights: torch.Tensor,
        math: ExpertMathFn,
    ) -> torch.Tensor:
        residency, phase = self.residency, self._phase
        hits, late, misses = residency.demand(keys)
        phase.hits += len(hits)
        phase.late += len(late)
        phase.misses += len(misses)
        leased = hits
        try:
            self._demand(layer, late, misses)
            # Demand first: a guess must never delay a needed copy.
            self._prefetch_next(layer, hidden)
            rows_of = _rows_by_key(routed, layer * self._num_experts)
            parts, slot_of = self.views.parts, residency.slot_of
            outputs: dict[int, torch.Tensor] = {}
            waited = {key for key, _ in late} | {key for key, _ in misses}
            if not self._hits_first:
                leased = leased + self._wait_for(waited)
                waited = set()
            for key in leased:
                outputs[key] = _weighted(math, hidden, weights, rows_of[key], parts(layer, slot_of(key)))
            while waited:
                arrived = self._wait_for_some(waited)
                leased = leased + arrived
                for key in arrived:
                    outputs[key] = _weighted(math, hidden, weights, rows_of[key], parts(layer, slot_of(key)))
            return _summed(hidden, keys, outputs, rows_of)
        finally:
            # By state, not by what was noted: an interrupt may come between a lease and its note.
            leased = [key for key in keys if residency.state(key) == LEASED]
            residency.release(leased)
            if not self._keep_across_tokens:
                residency.drop(leased)

    def _demand(self, layer: int, late: list[tuple[int, int]], misses: list[tuple[int, int]]) -> None:
        for key, _ in late:
            self.transfer.promote(key)
        for key, slot in misses:
            self.transfer.demand(key, slot)
        self._phase.demand_loads += len(misses)
        self._phase.demand_bytes += len(misses) * self._expert_bytes[layer]

    def _prefetch_next(self, layer: int, hidden: torch.Tensor) -> None:
        following = layer + 1
        if self._predictor is None or following == len(self._widths):
            return
        if self.residency.resident_per_layer[following] == self._widths[following]:
            return
        base = following * self._num_experts
        guess = [base + expert for expert in self._predictor.guess(layer, hidden)]
        loads = self.residency.prefetch(guess)
        for key, slot in loads:
            self.transfer.prefetch(key, slot)
        self._guessed[following].extend(key for key, _ in loads)
        self._phase.prefetch_loads += len(loads)
        self._phase.prefetch_bytes += len(loads) * self._expert_bytes[following]

    def _drop_contradicted(self, layer: int, keys: Sequence[int]) -> None:
        """Queued guesses for this layer that its router did not confirm are taken back."""
        guessed = self._guessed[layer]
        if not guessed:
            return
        wanted = set(keys)
        for key in guessed:
            if key not in wanted and self.transfer.cancel(key):
                self.residency.cancel(key)
                self._phase.prefetch_cancelled += 1
                self._phase.prefetch_loads -= 1
                self._phase.prefetch_bytes -= self._expert_bytes[layer]
        guessed.clear()

    def _wait_for(self, waited: set[int]) -> list[int]:
        remaining, arrived = set(waited), list[int]()
        while remaining:
            arrived.extend(self._wait_for_some(remaining))
        return arrived

    def _wait_for_some(self, waited: set[int]) -> list[int]:
        """Block until at least one of `waited` is there; lease and remove those that are."""
        started = self._clock()
        try:
            while True:
                ready = self._settle(self.transfer.wait(), waited)
                if ready:
                    break
        finally:
            self._phase.stall_s += self._clock() - started
        for key in ready:
            self.residency.lease(key)
            waited.discard(key)
        return ready

    def _settle(self, completions: Sequence[Completion], waited: set[int] | frozenset[int] = frozenset()) -> list[int]:
        """Book what the readers finished; returns those of `waited` that arrived.

        A failed guess is forgotten: if its expert is needed it is demanded again, and fails there if it must.
        """
        ready: list[int] = []
        failure: Exception | None = None
        for completion in completions:
            if completion.error is None:
                self.residency.loaded(completion.key)
                if completion.key in waited:
                    ready.append(completion.key)
            else:
                self.residency.fail(completion.key)
                if completion.key in waited:
                    failure = completion.error
        if failure is not None:
            raise failure
        return ready

    # Prefill, and steps whose demand is larger than the pool: experts pass by in ascending order.

    def _compute_streamed(
        self, layer: int, keys: list[int], hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        family_forward, math = self._family_forwards[layer], self._math[layer]
        if not keys:
            return torch.zeros_like(hidden)
        self._quiesce()
        stream = ExpertStream(self, layer, keys, self._phase, self._clock)
        try:
            if math is None:
                assert family_forward is not None
                return family_forward(stream, hidden, ids, weights)
            out = torch.zeros_like(hidden)
            base = layer * self._num_experts
            for key, tokens, positions in group_by_expert(ids, keys, base):
                rows = math(hidden[tokens], stream.parts(key))
                rows = rows * weights[tokens, positions, None]
                out.index_add_(0, tokens, rows.to(out.dtype))
            return out
        finally:
            stream.close()
            if not self._keep_across_tokens:
                self.residency.drop([key for key in keys if self.residency.state(key) == READY])

    def _quiesce(self) -> None:
        """Take back the guesses that have not started and let those that have land: prefill wants the slots."""
        for guessed in self._guessed:
            for key in guessed:
                if self.transfer.cancel(key):
                    self.residency.cancel(key)
                    self._phase.prefetch_cancelled += 1
            guessed.clear()
        while self.transfer.num_in_flight:
            self._settle(self.transfer.wait())


# (token, position in top-k) pairs, sorted by position and then token, as transformers' eager experts order them.
_Rows = dict[int, list[tuple[int, int]]]


def _rows_by_key(routed: list[list[int]], base: int) -> _Rows:
    rows: _Rows = {}
    for position in range(len(routed[0])):
        for token, row in enumerate(routed):
            rows.setdefault(base + row[position], []).append((token, position))
    return rows


def _weighted(
    math: ExpertMathFn,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    rows: list[tuple[int, int]],
    parts: Parts,
) -> torch.Tensor:
    if len(hidden) == 1:
        position = rows[0][1]
        return (math(hidden, parts) * weights[:, position : position + 1]).to(hidden.dtype)
    tokens = torch.tensor([token for token, _ in rows])
    positions = torch.tensor([position for _, position in rows])
    return (math(hidden[tokens], parts) * weights[tokens, positions, None]).to(hidden.dtype)


def _summed(hidden: torch.Tensor, keys: list[int], outputs: dict[int, torch.Tensor], rows: _Rows) -> torch.Tensor:
    out = torch.zeros_like(hidden)
    if len(hidden) == 1:
        for key in keys:
            out.add_(outputs[key])
        return out
    for key in keys:
        out.index_add_(0, torch.tensor([token for token, _ in rows[key]]), outputs[key])
    return out
