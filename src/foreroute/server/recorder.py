"""What the engine does with the token at hand, kept in memory for whoever watches: nothing while nobody does.

`Recorder.attach` makes it the runtime's `tracing` and puts it before the transfer; `leave` takes both away again. The
engine's thread writes, any thread reads. What was recorded never changes afterwards, so a reader needs no lock: at
worst it sees a layer more or less. Cost: a few microseconds per MoE layer (benchmarks/live_cost.py measures it).
"""

import time
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NamedTuple, cast

import torch

from foreroute.engine.runtime import Runtime
from foreroute.engine.stats import EngineStats
from foreroute.engine.tracing import StepTrace
from foreroute.transfer.base import Completion, Transfer

DEMAND, GUESS, FILL = range(3)


class LayerRecord(NamedTuple):
    """One MoE layer of a step. Keys are expert keys; times are by the clock, in seconds.

    there: demanded, and in memory from an earlier use. in_time: in memory because they had been guessed.
    late: guessed, and still on their way. missing: read while the layer waited. stood_in: not waited for.
    waits: (began, ended) of the times in which compute waited for bytes.
    """

    layer: int
    there: Sequence[int]
    in_time: Sequence[int]
    late: Sequence[int]
    missing: Sequence[int]
    stood_in: Sequence[int]
    began_s: float
    ended_s: float
    waits: Sequence[tuple[float, float]]


class StepRecord:
    """One forward pass, while it goes and afterwards.

    Attributes:
        number: counted from when the recorder was attached. phase: "prefill" or "decode".
        ended_s: when its last MoE layer was computed; 0 while it goes.
        guesses: layer -> its experts that were guessed in this step, best first.
        reads: (key, why, began, ended) of reads that were handed out in this step.
        wasted: keys that were read on a guess and given up in this step before anybody wanted them.
    """

    def __init__(self, number: int, phase: str, rows: int, positions: int, began_s: float) -> None:
        self.number = number
        self.phase = phase
        self.rows = rows
        self.positions = positions
        self.began_s = began_s
        self.ended_s = 0.0
        self.layers: list[LayerRecord] = []
        self.guesses: dict[int, Sequence[int]] = {}
        self.reads: list[tuple[int, int, float, float]] = []
        self.wasted: list[int] = []


class Recorder(StepTrace):
    """Keeps the last step and the one at hand.

    Args:
        runtime: the engine's; closed by its owner.
        clock: the one that the readers time themselves by.

    Attributes:
        last: the last step that is over. current: the one that goes, or went last.
        pending: key -> slot of experts that were read on a guess, or are being read, and that nobody wanted yet.
        timed_steps, timed_s: decode steps that followed on another one, and the seconds from begin to begin.
    """

    def __init__(self, runtime: Runtime, clock: Callable[[], float] = time.perf_counter) -> None:
        self._runtime = runtime
        self._clock = clock
        self._lock = Lock()
        self._is_wanted = False
        self._behind: StepTrace | None = None
        self._last_layer = len(runtime.table.layers) - 1
        self._forget()

    def _forget(self) -> None:
        self.last: StepRecord | None = None
        self.current: StepRecord | None = None
        self.pending: dict[int, int] = {}
        self.timed_steps, self.timed_s = 0, 0.0
        self._guessed_in: dict[int, int] = {}  # slot -> pending key
        self._why: dict[int, int] = {}
        self._waits: list[tuple[float, float]] = []
        self._in_time: list[int] = []
        self._number = 0
        self.layer = -1
        self._began_s = 0.0
        self.hits, self.late, self.misses, self.stood_in = [], [], [], []

    # Any thread.

    def attach(self) -> None:
        """Record from the next step on. A trace that is written goes on being written."""
        with self._lock:
            self._is_wanted = True
            if self._runtime.tracing is not self:
                self._forget()
                self._behind = self._runtime.tracing
                # One store: the engine's thread looks whether there is a trace each time before it tells one.
                self._runtime.tracing = self

    def leave(self) -> None:
        """Record no more; the engine's own thread takes the recorder away when its next step begins."""
        with self._lock:
            self._is_wanted = False

    # The engine's thread: what StepTrace is told.

    def step(self, phase: str, rows: int, positions: int, is_start: bool) -> None:
        """A forward pass begins: the only place where a recorder comes and goes."""
        if self._behind is not None:
            self._behind.step(phase, rows, positions, is_start)
        if not self._is_wanted and self._detach():
            return
        runtime = self._runtime
        if not isinstance(runtime.transfer, _TransferFront):
            runtime.transfer = cast(Transfer, _TransferFront(runtime.transfer, self))
        now, before = self._clock(), self.current
        if before is not None and before.phase == phase == "decode" and before.rows == rows:
            self.timed_steps += 1
            self.timed_s += now - before.began_s
        self._number += 1
        self.current = StepRecord(self._number, phase, rows, positions, now)

    def _detach(self) -> bool:
        with self._lock:
            if self._is_wanted:
                return False
            runtime = self._runtime
            if isinstance(runtime.transfer, _TransferFront):
                runtime.transfer = runtime.transfer.behind
            runtime.tracing = self._behind
            return True

    def begin_layer(self, layer: int, ids: torch.Tensor, weights: torch.Tensor, is_prefill: bool, width: int) -> None:
        """A layer's experts are called."""
        self.layer = layer
        if self._behind is not None:
            self._behind.begin_layer(layer, ids, weights, is_prefill, width)
            # The same lists: some of what a step does is added to them by others.
            self.hits, self.late = self._behind.hits, self._behind.late
            self.misses, self.stood_in = self._behind.misses, self._behind.stood_in
        else:
            self.hits, self.late, self.misses, self.stood_in = [], [], [], []
        self._waits, self._in_time = [], []
        self._began_s = self._clock()

    def found(self, hits: Sequence[int], late: Sequence[int], misses: Sequence[int]) -> None:
        """What became of the keys that are waited for."""
        self.hits += hits
        self.late += late
        self.misses += misses
        if self.pending:
            self._in_time += [key for key in hits if self._wanted(key)]
            for key in late:
                self._wanted(key)

    def _wanted(self, key: int) -> bool:
        slot = self.pending.pop(key, None)
        if slot is None:
            return False
        self._guessed_in.pop(slot, None)
        return True

    def end_layer(self) -> None:
        """The layer's experts have been computed."""
        if self._behind is not None:
            self._behind.end_layer()
        step = self.current
        if step is None or self.layer < 0:
            return
        ended = self._clock()
        there = self.hits
        if self._in_time:
            there = [key for key in there if key not in self._in_time]
        step.layers.append(
            LayerRecord(
                self.layer,
                there,
                self._in_time,
                self.late,
                self.misses,
                self.stood_in,
                self._began_s,
                ended,
                self._waits,
            )
        )
        if self.layer == self._last_layer:
            step.ended_s = ended
            self.last = step

    def stall(self, began_s: float, ended_s: float) -> None:
        """Compute waited for bytes."""
        if self._behind is not None:
            self._behind.stall(began_s, ended_s)
        self._waits.append((began_s, ended_s))

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """These experts of `layer` are expected, best first."""
        if self._behind is not None:
            self._behind.guess(layer, experts)
        if self.current is not None:
            self.current.guesses[layer] = list(experts)

    def governor(self, share: float, why: str) -> None:
        """From now on so much of the full width is guessed."""
        if self._behind is not None:
            self._behind.governor(share, why)

    def end(self, stats: EngineStats) -> None:
        """The model is closed."""
        if self._behind is not None:
            self._behind.end(stats)

    # The engine's thread: what goes through the transfer.

    def asked(self, why: int, key: int, slot: int) -> None:
        """The slot is to hold this key; what it held goes."""
        before = self._guessed_in.pop(slot, None)
        if before is not None and self.pending.pop(before, None) is not None and self.current is not None:
            self.current.wasted.append(before)
        if why == GUESS:
            self.pending[key] = slot
            self._guessed_in[slot] = key
        self._why[key] = why

    def withdrawn(self, key: int) -> None:
        """The read had not begun."""
        self._wanted(key)
        self._why.pop(key, None)

    def over(self, completions: Sequence[Completion]) -> None:
        """These reads are done."""
        reads = self.current.reads if self.current is not None else []
        for one in completions:
            reads.append((one.key, self._why.pop(one.key, DEMAND), one.begun_s, one.ended_s))
            if one.error is not None:
                self._wanted(one.key)

    def emptied(self) -> None:
        """Nothing is in memory any more, and nothing on its way."""
        self.pending.clear()
        self._guessed_in.clear()
        self._why.clear()


class _TransferFront:
    """The transfer, with the recorder told of what passes."""

    def __init__(self, behind: Transfer, recorder: Recorder) -> None:
        self.behind = behind
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.behind, name)

    @property
    def num_in_flight(self) -> int:
        return self.behind.num_in_flight

    def demand(self, key: int, slot: int) -> None:
        self._recorder.asked(DEMAND, key, slot)
        self.behind.demand(key, slot)

    def prefetch(self, key: int, slot: int) -> None:
        self._recorder.asked(GUESS, key, slot)
        self.behind.prefetch(key, slot)

    def fill(self, key: int, slot: int) -> None:
        self._recorder.asked(FILL, key, slot)
        self.behind.fill(key, slot)

    def cancel(self, key: int) -> bool:
        is_gone = self.behind.cancel(key)
        if is_gone:
            self._recorder.withdrawn(key)
        return is_gone

    def completed(self) -> list[Completion]:
        done = self.behind.completed()
        if done:
            self._recorder.over(done)
        return done

    def wait(self) -> list[Completion]:
        done = self.behind.wait()
        self._recorder.over(done)
        return done

    def reset(self) -> None:
        self.behind.reset()
        self._recorder.emptied()
