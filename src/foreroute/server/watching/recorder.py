"""What the engine does with the token at hand, kept in memory for whoever watches: nothing while nobody does.

`Recorder.attach` makes it the runtime's `tracing`; `leave` takes it away again. The engine's thread only puts down what
it is told; a `StepRecord` is made sense of (`digest`) where somebody looks at it, in the server's thread, a few times a
second. What was put down never changes afterwards, so a reader needs no lock: at worst it sees a layer
more or less. Cost: benchmarks/live_cost.py measures it.
"""

import time
from collections.abc import Callable, Collection, Sequence
from threading import Lock
from typing import Any, NamedTuple

import torch

from foreroute.engine.moe_step import Runtime
from foreroute.engine.stats import EngineStats
from foreroute.engine.step_trace import StepTrace
from foreroute.residency.slots import FREE
from foreroute.transfer.base import Completion

DEMAND, GUESS, FILL = range(3)
# The place in a LayerRecord that is written last.
_ENDED = 6


class LayerRecord(NamedTuple):
    """One MoE layer of a step. Keys are expert keys; times are by the clock, in seconds.

    found: demanded, and in memory. late: guessed, and still on their way. missing: read while the layer waited.
    stood_in: not waited for. waits: (began, ended) of the times in which compute waited for bytes. ended_s: 0 while it
    goes.
    """

    layer: int
    found: Sequence[int]
    late: Sequence[int]
    missing: Sequence[int]
    stood_in: Sequence[int]
    began_s: float
    ended_s: float
    waits: Sequence[tuple[float, float]]


class StepRecord:
    """One forward pass as it was told, while it goes and afterwards.

    Attributes:
        number: counted from when the recorder was attached. phase: "prefill" or "decode".
        ended_s: when its last MoE layer was computed; 0 while it goes.
        staged, staged_after: keys that lay there on a guess, asked for by nobody yet, when it began and when it ended.
        guesses: (layer, its experts that were guessed in this step, best first).
        arrived: reads that were handed out in this step, as they came.
        filled: keys on their way, or asked for in this step, that were stood in for.
    """

    __slots__ = (
        "arrived", "began_s", "ended_s", "filled", "guesses", "layers", "number", "phase", "positions", "rows",
        "staged", "staged_after",
    )  # fmt: skip

    def __init__(
        self, number: int, phase: str, rows: int, positions: int, began_s: float, staged: Collection[int] = ()
    ) -> None:
        self.number = number
        self.phase = phase
        self.rows = rows
        self.positions = positions
        self.began_s = began_s
        self.ended_s = 0.0
        self.staged = staged
        self.staged_after: Collection[int] = ()
        # As of LayerRecord, which takes longer to make.
        self.layers: list[list[Any]] = []
        self.guesses: list[tuple[int, Sequence[int]]] = []
        self.arrived: list[Sequence[Completion]] = []
        self.filled: list[int] = []


class Digest(NamedTuple):
    """What a step's record means.

    layers: those that are over. in_time: for each of them, what it found there because it had been guessed.
    reads: (key, why, began, ended) of the reads that were handed out in the step, as they came.
    wasted: keys that were read on a guess, and given up in the step before anybody asked for them.
    """

    layers: Sequence[LayerRecord]
    in_time: Sequence[Collection[int]]
    reads: Sequence[tuple[int, int, float, float]]
    wasted: Sequence[int]


def digest(step: StepRecord, state: Callable[[int], int]) -> Digest:
    """Any thread, while the step goes or afterwards. state: of a key, in the pool now."""
    begun = [LayerRecord(*layer) for layer in list(step.layers)]
    layers = [layer for layer in begun if layer.ended_s]
    arrived = [one for some in list(step.arrived) for one in some]
    missing = {key for layer in begun for key in layer.missing}
    # A guess that was given up before its layer came is read again, on demand: that is its last read in the step.
    last = {one.key: place for place, one in enumerate(arrived)}
    reads = []
    # Guesses that nobody had asked for, of which each layer's demand takes its own.
    guessed = dict.fromkeys(step.staged)
    # What was there and is read again had been given up.
    again = []
    for place, one in enumerate(arrived):
        why = GUESS
        if one.key in missing and last[one.key] == place:
            why = DEMAND
        elif one.key in step.filled:
            why = FILL
        elif one.error is None:
            if one.key in guessed:
                again.append(one.key)
            guessed[one.key] = None
        reads.append((one.key, why, one.begun_s, one.ended_s))
    asked = {key for layer in begun for keys in (layer.found, layer.late, layer.stood_in) for key in keys}
    if step.ended_s:
        wasted = [key for key in guessed if key not in asked and key not in step.staged_after]
    else:
        wasted = [key for key in guessed if key not in asked and state(key) == FREE]
    in_time = [[key for key in layer.found if key in guessed] for layer in layers]
    return Digest(layers, in_time, reads, again + wasted)


class Recorder(StepTrace):
    """Keeps the last step and the one at hand.

    Args:
        runtime: the engine's; closed by its owner.
        clock: the one that the readers time themselves by.

    Attributes:
        last: the last step that is over. current: the one that goes, or went last.
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
        # Takes what is told of a step that began before the recorder came.
        self._step = StepRecord(0, "", 0, 0, 0.0)
        self.timed_steps, self.timed_s = 0, 0.0
        self.layer = -1
        self._going: list[Any] = list(LayerRecord(-1, (), (), (), (), 0.0, 0.0, ()))
        self.hits, self.late, self.misses, self.stood_in = [], [], [], []
        self._waits: list[tuple[float, float]] = []

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

    # The engine's thread: what a StepTrace is told.

    def step(self, phase: str, rows: int, positions: int, is_start: bool) -> None:
        """A forward pass begins: the only place where a recorder goes."""
        if self._behind is not None:
            self._behind.step(phase, rows, positions, is_start)
        if not self._is_wanted and self._detach():
            return
        now, before, residency = self._clock(), self._step, self._runtime.residency
        if before.phase == phase == "decode" and before.rows == rows:
            self.timed_steps += 1
            self.timed_s += now - before.began_s
        self._step = step = StepRecord(before.number + 1, phase, rows, positions, now, tuple(residency.staged_ready))
        if before.filled:
            step.filled = [key for key in before.filled if key in residency.filling]
        self.current = step

    def _detach(self) -> bool:
        with self._lock:
            if self._is_wanted:
                return False
            self._runtime.tracing = self._behind
            return True

    def begin_layer(self, layer: int, ids: torch.Tensor, weights: torch.Tensor, is_prefill: bool, width: int) -> None:
        """A layer's experts are called."""
        self.layer = layer
        self.hits, self.late, self.misses, self.stood_in, self._waits = [], [], [], [], []
        self._going = [
            layer, self.hits, self.late, self.misses, self.stood_in, self._clock(), 0.0, self._waits
        ]  # fmt: skip
        self._step.layers.append(self._going)
        if self._behind is not None:
            self._behind.begin_layer(layer, ids, weights, is_prefill, width)
            # The same lists: some of what a step does is added to them by others.
            self._behind.hits, self._behind.late = self.hits, self.late
            self._behind.misses, self._behind.stood_in = self.misses, self.stood_in

    def found(self, hits: Sequence[int], late: Sequence[int], misses: Sequence[int]) -> None:
        """What became of the keys that are waited for."""
        self.hits += hits
        self.late += late
        self.misses += misses

    def end_layer(self) -> None:
        """The layer's experts have been computed."""
        behind = self._behind
        if behind is not None:
            if behind.hits is not self.hits:
                # The recorder came in the middle of this layer: what it was told since then is the trace's as well.
                behind.found(self.hits, self.late, self.misses)
                behind.stood_in += self.stood_in
            behind.end_layer()
        self._going[_ENDED] = ended = self._clock()
        if self.layer == self._last_layer:
            step = self._step
            step.staged_after = tuple(self._runtime.residency.staged_ready)
            step.ended_s = ended
            self.last = self.current

    def stall(self, began_s: float, ended_s: float) -> None:
        """Compute waited for bytes."""
        if self._behind is not None:
            self._behind.stall(began_s, ended_s)
        self._waits.append((began_s, ended_s))

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """These experts of `layer` are expected, best first."""
        if self._behind is not None:
            self._behind.guess(layer, experts)
        self._step.guesses.append((layer, experts))

    def filled(self, keys: Sequence[int]) -> None:
        """These are read though nobody waits: they were stood in for."""
        self._step.filled += keys

    def arrived(self, completions: Sequence[Completion]) -> None:
        """These reads are over."""
        self._step.arrived.append(completions)

    def governor(self, share: float, why: str) -> None:
        """From now on so much of the full width is guessed."""
        if self._behind is not None:
            self._behind.governor(share, why)

    def end(self, stats: EngineStats) -> None:
        """The model is closed."""
        if self._behind is not None:
            self._behind.end(stats)
