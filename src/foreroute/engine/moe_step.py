"""One MoE layer's step: what is there, what must come, what may be wanted next. Read `compute` first.

The decode path, per layer: read the routing back once, lease what is there, start loading what is missing, guess the
next layer's experts and queue them behind, compute the experts that are there while the others arrive, and add the
outputs up in ascending expert id, which is the order of transformers' eager experts and so gives its bits.
"""

import copy
import time
from collections.abc import Callable, Collection, Sequence
from math import inf

import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.engine.approximation import Approximation
from foreroute.engine.combine import DecodeStep, RowsStep, TokenStep, Workspace, is_distinct
from foreroute.engine.expert_stream import ExpertStream, FamilyForward, group_by_expert
from foreroute.engine.interfaces import ExpertListener, Learner, Observer, Predictor
from foreroute.engine.prefetcher import ReadsAhead
from foreroute.engine.stats import EngineStats, PhaseStats
from foreroute.engine.step_trace import StepTrace
from foreroute.engine.substitution import StandingIn
from foreroute.kernels.slot_views import SlotViews
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.predict.base import Seen
from foreroute.predict.governor import Governor
from foreroute.residency.slots import LOADING, READY, Residency
from foreroute.transfer.base import Completion, Transfer


class Runtime:
    """The engine of one loaded model: holds the parts and runs the step. Built by loader.py.

    Args:
        math: per MoE layer, None where ours could not be proven equal to the family's.
        family_forwards: per MoE layer, what runs in that case.
        workspaces: per MoE layer, shared by layers of one shape; None where math is.
        free_slots: lets go of the pool's memory, after the readers have stopped.
        prefill_guesses_from: routed slots per expert of a layer from which guesses fetch in prefill too: 0 always.
        keep_across_tokens: False gives every expert up after its layer (on-demand loading).
        approximation: the policies other than exact; None where there is exact alone.
        governor: decides how much is guessed in decode; None always guesses all.

    Attributes:
        observer, expert_listener: who watches; None, and free, until somebody does. They must change nothing.
        is_prefill: the forward pass has several positions per row, or is the first of its text.
        key_nbytes: stored bytes of each expert, by its key.
        phase: the counts of prefill or decode, whichever runs. ahead: the reads that nobody waits for.
        learner: learns better guesses in the time that compute waits; None where there is nothing to learn.
        tracing: is told what happens; None where nobody wants to know.
        padding: [tokens] bool, which of a prompt's step are padding: no expert computes them, nobody learns from them.
    """

    def __init__(
        self,
        table: ExpertTable,
        residency: Residency,
        transfer: Transfer,
        views: SlotViews,
        math: Sequence[ExpertMath | None],
        family_forwards: Sequence[FamilyForward],
        workspaces: Sequence[Workspace | None],
        predictor: Predictor | None,
        *,
        free_slots: Callable[[], None] = lambda: None,
        hits_first: bool = True,
        keep_across_tokens: bool = True,
        prefill_guesses_from: float = inf,
        approximation: Approximation | None = None,
        governor: Governor | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.table = table
        self.residency = residency
        self.transfer = transfer
        self.views = views
        self.stats = EngineStats()
        self.phase: PhaseStats = self.stats.decode
        self._math = math
        self._family_forwards = family_forwards
        self._workspaces = workspaces
        self.predictor = predictor
        self._free_slots = free_slots
        self._hits_first = hits_first
        self.keeps_across_tokens = keep_across_tokens
        self._prefill_guesses_from = prefill_guesses_from
        self.approximation = approximation
        self._clock = clock
        self.observer: Observer | None = None
        self.expert_listener: ExpertListener | None = None
        self.learner: Learner | None = None
        self.tracing: StepTrace | None = None
        self.padding: torch.Tensor | None = None
        self._num_experts, self._last_layer = table.num_experts, len(table.layers) - 1
        self._widths = [layer.num_experts for layer in table.layers]
        self.key_nbytes = table.key_nbytes
        self.is_prefill = False
        self._num_rows = 1
        # Still True where a step begins: the one before was cut off, by an error or by Ctrl-C, between any two lines.
        self._is_mid_step = False
        # A step's whole demand must fit beside the guesses that are on their way.
        self._most_leased = residency.num_slots - residency.staging_slots
        self.ahead = ReadsAhead(self, governor, clock)

    def begin_step(
        self, num_rows: int, num_positions: int, token_ids: torch.Tensor | None = None, *, is_start: bool = False
    ) -> None:
        """A forward pass of [num_rows, num_positions] tokens begins; `token_ids` of that shape, where it has them.

        Args:
            is_start: nothing was computed before it: a prompt, of a single token too.
        Raises:
            PolicyError: policies were set for another number of rows.
        """
        if self.approximation is not None:
            self.approximation.of_rows(num_rows)
        self.ahead.book(self.phase)
        self._num_rows = num_rows
        self.is_prefill = is_start or num_positions > 1
        self.phase = self.stats.prefill if self.is_prefill else self.stats.decode
        self.phase.steps += 1
        self.phase.tokens += num_rows * num_positions - (0 if self.padding is None else int(self.padding.sum()))
        if self.tracing is not None:
            self.tracing.step("prefill" if self.is_prefill else "decode", num_rows, num_positions, is_start)
        if self._is_mid_step:
            self._start_over()
        self._is_mid_step = True
        self.residency.tick()
        if self.transfer.num_in_flight:
            self.settle(self.transfer.completed())
        if not self.keeps_across_tokens:
            self.residency.drop(self.residency.ready_keys())
        self.ahead.begin_step(num_rows, None if self.is_prefill else token_ids)
        self._is_mid_step = False

    def compute(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The routed experts' weighted sum for MoE layer `layer`.

        Args:
            hidden: [tokens, hidden]. weights: [tokens, k].
            ids: [tokens, k] int64; those that are no expert of the layer are ignored.
        Returns:
            [tokens, hidden], in `hidden`'s dtype.
        Raises:
            ReadError, ChecksumError: an expert could not be read; the model is usable, its pool starts over.
        """
        if self._is_mid_step:
            self._start_over()
        self._is_mid_step = True
        if self.padding is not None:
            ids = ids.masked_fill(self.padding[:, None], self._widths[layer])
        if self.tracing is not None:
            self.tracing.begin_layer(layer, ids, weights, self.is_prefill, self._widths[layer])
        total = self._compute(layer, hidden, ids, weights)
        if self.tracing is not None:
            self.tracing.end_layer()
        if layer == self._last_layer:
            self.ahead.end_step()
        self._is_mid_step = False
        return total

    def _compute(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self._show(layer, hidden, ids, weights)
        approximation = self.approximation
        if self.is_prefill or approximation is None or approximation.is_exact:
            approximation = None
        else:
            ids, weights = approximation.route(layer, ids, weights)
        width, base = self._widths[layer], layer * self._num_experts
        # The one read-back of the layer. What is no expert becomes -1, which no key is.
        routed = [[base + expert if 0 <= expert < width else -1 for expert in row] for row in ids.tolist()]
        keys = sorted(set(routed[0]) if len(routed) == 1 else {key for row in routed for key in row})
        if keys[0] < 0:
            keys = [key for key in keys if key >= 0]
        if not keys:
            return torch.zeros_like(hidden)
        if self.transfer.num_in_flight:
            self.settle(self.transfer.completed())
        self.ahead.drop_contradicted(layer, keys, self.phase)
        math = self._math[layer]
        if math is None or self.is_prefill or len(keys) > self._most_leased - len(self.residency.filling):
            if approximation is not None:
                approximation.see(layer, hidden, ids, weights)
            return self._compute_streamed(layer, keys, hidden, ids, weights)
        step = self._decode_step(layer, math, routed, hidden, weights)
        seen = (hidden, ids, weights)
        if approximation is None:
            return self._compute_leased(layer, keys, step, lambda: self.ahead.guess_next(layer, *seen))
        absent = approximation.not_waited_for(layer, keys, routed, weights, self.residency.contains_ready)
        around = StandingIn(self, layer, absent, step, approximation, Seen(*seen))
        needed = [key for key in keys if key not in absent] if absent else keys
        return self._compute_leased(layer, needed, step, around.prefetch_next, around.at_last if absent else None)

    def _show(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """To all who watch, what the layer's router chose."""
        if self.observer is not None:
            self.observer(layer, hidden, ids, weights)
        if self.learner is not None and self.padding is None:
            self.learner.see(layer, hidden, ids, weights)
        if layer == 0 and self.predictor is not None and self.padding is None:
            self.predictor.see_first(hidden, self._num_rows)

    def close(self) -> None:
        """Stop the readers and let go of the pool; the model's experts can no longer be computed."""
        if self.learner is not None:
            self.learner.close()
        self.transfer.close()
        tracing, self.tracing = self.tracing, None
        try:
            if tracing is not None:
                tracing.end(self.snapshot())
        finally:
            self.views.clear()
            self._free_slots()

    def snapshot(self) -> EngineStats:
        """A copy of all counts since the model was loaded."""
        stats = self.stats
        stats.evictions = self.residency.evictions
        self.ahead.book(self.phase)
        stats.read_bytes, stats.read_s = self.transfer.bytes_read, self.transfer.busy_s
        return copy.deepcopy(stats)

    # Decode: everything that the step needs is leased at once.

    def _decode_step(
        self,
        layer: int,
        math: ExpertMath,
        routed: list[list[int]],
        hidden: torch.Tensor,
        weights: torch.Tensor,
    ) -> DecodeStep:
        operands, slot_of = self.views.operands, self.residency.slot_of

        def operands_of(key: int) -> tuple[torch.Tensor, ...]:
            return operands(layer, slot_of(key))

        workspace = self._workspaces[layer]
        if len(routed) == 1 and workspace is not None and is_distinct(routed[0]):
            return TokenStep(workspace, math, operands_of, hidden, routed[0], weights)
        return RowsStep(math, operands_of, hidden, routed, weights, self.views.most_at_once(layer))

    def _compute_leased(
        self,
        layer: int,
        keys: list[int],
        step: DecodeStep,
        prefetch_next: Callable[[], None],
        at_last: Callable[[], list[int]] | None = None,
    ) -> torch.Tensor:
        """Lease `keys`, and compute them as they arrive; `at_last` adds others to the step, and says what it leased."""
        residency = self.residency
        hits, late, misses = residency.demand(keys)
        if self.tracing is not None:
            self.tracing.found(hits, [key for key, _ in late], [key for key, _ in misses])
        self.phase.hits += len(hits)
        self.phase.layers += 1
        waited: set[int] = set()
        if late or misses:
            self.phase.stalled_layers += 1
            self.phase.first_waited += len(late) + len(misses) if layer == 0 else 0
            waited = self._demand(layer, late, misses)
        # Demand first: a guess must never delay a needed copy.
        prefetch_next()
        while waited and not self._hits_first:
            hits += self._wait_for_some(waited)
        if hits:
            step.run(hits)
        while waited:
            step.run(self._wait_for_some(waited))
        if at_last is not None:
            keys = keys + at_last()
        total = step.total()
        residency.release(keys)
        if not self.keeps_across_tokens:
            residency.drop(keys)
        return total

    def _demand(self, layer: int, late: list[tuple[int, int]], misses: list[tuple[int, int]]) -> set[int]:
        for key, _ in late:
            self.transfer.promote(key)
        for key, slot in misses:
            self.transfer.demand(key, slot)
        phase = self.phase
        phase.late += len(late)
        phase.misses += len(misses)
        phase.demand_loads += len(misses)
        phase.demand_bytes += sum(self.key_nbytes[key] for key, _ in misses)
        return {key for key, _ in late} | {key for key, _ in misses}

    def _wait_for_some(self, waited: set[int]) -> list[int]:
        """Block until at least one of `waited` is there; lease those that are, and take them out of `waited`."""
        started = self._clock()
        ready: list[int] = []
        try:
            while not ready:
                ready = self.settle(self.await_completions(), waited)
        finally:
            self.stalled_since(started)
        for key in ready:
            self.residency.lease(key)
            waited.discard(key)
        return ready

    def stalled_since(self, started_s: float) -> None:
        """Compute has waited for bytes from then, by the clock, until now."""
        ended_s = self._clock()
        self.phase.stall_s += ended_s - started_s
        if self.tracing is not None:
            self.tracing.stall(started_s, ended_s)

    def await_completions(self) -> Sequence[Completion]:
        """Block until a reader has finished something; meanwhile the learner works, a little at a time."""
        if self.learner is not None:
            while True:
                done = self.transfer.completed()
                if done:
                    return done
                if not self.learner.work():
                    break
        return self.transfer.wait()

    def settle(self, completions: Sequence[Completion], waited: Collection[int] = ()) -> list[int]:
        """Book what the readers finished; returns those of `waited` that arrived.

        A failed guess is forgotten: if its expert is needed it is demanded again, and fails there if it must.
        """
        ready: list[int] = []
        failure: Exception | None = None
        if completions and self.tracing is not None:
            self.tracing.arrived(completions)
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
        on_their_way = {key for key in keys if self.residency.state(key) == LOADING}
        self._quiesce()
        math = self._math[layer]
        stream = ExpertStream(self, layer, keys, self.phase, self._clock)
        # What was waited for before the stream began is late, though it found it there.
        late = [key for key in stream.found if key in on_their_way]
        self.phase.hits -= len(late)
        self.phase.late += len(late)
        if self.tracing is not None:
            self.tracing.found([key for key in stream.found if key not in on_their_way], late, stream.missed)
        if not self.is_prefill:
            num_waited = len(late) + len(stream.missed)
            self.phase.layers += 1
            self.phase.stalled_layers += num_waited > 0
            self.phase.first_waited += num_waited if layer == 0 else 0
        width = self._widths[layer]
        if self.is_prefill and int((ids < width).sum()) >= self._prefill_guesses_from * width:
            # Behind this layer's queued reads: it delays those that the ring asks for later by at most itself.
            self.ahead.guess_next(layer, hidden, ids, weights)
        if math is None:
            total = self._family_forwards[layer](stream, hidden, ids, weights)
        else:
            total = torch.zeros_like(hidden)
            for key, tokens, positions in group_by_expert(ids, keys, layer * self._num_experts):
                outputs = math(hidden[tokens], stream.operands(key))
                if self.expert_listener is not None:
                    self.expert_listener(layer, key - layer * self._num_experts, outputs)
                rows = outputs * weights[tokens, positions, None]
                total.index_add_(0, tokens, rows.to(total.dtype))
        stream.close()
        if not self.keeps_across_tokens:
            self.residency.drop([key for key in keys if self.residency.state(key) == READY])
        return total

    def _start_over(self) -> None:
        """Forget what a broken-off step left behind: right wherever it broke off. The pool is empty then."""
        self.transfer.reset()
        self.residency.clear()
        self.ahead.forget()

    def _quiesce(self) -> None:
        """Take back the guesses that have not started and let the others land: prefill wants the slots."""
        self.ahead.drop_all(self.phase)
        if not self.transfer.num_in_flight:
            return
        started = self._clock()
        while self.transfer.num_in_flight:
            self.settle(self.await_completions())
        self.stalled_since(started)
