"""What the engine does with the token at hand, kept in memory while somebody watches.

A `Recorder` is an observer of the pool (`ExpertPool.add_observer`). The engine's thread only notes what it is told; a
`StepRecord` is interpreted (`digest`) where somebody looks at it, in the server's thread, a few times a second. What
was noted never changes afterwards, so a reader needs no lock: at worst it sees a layer more or less. Cost:
benchmarks/live_cost.py measures it.
"""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch

from foreroute.engine.interfaces import StepInfo, StepObserver
from foreroute.engine.pool import ExpertPool
from foreroute.residency.slots import FREE
from foreroute.transfer.base import Completion

DEMAND, GUESS, DEFERRED = range(3)
# The place in a LayerRecord that is written last.
_ENDED = 6


class LayerRecord(NamedTuple):
    """One MoE layer of a step. Keys are expert keys; times are by the clock, in seconds.

    found: demanded, and resident. late: prefetched, and still in flight. missing: read while the layer waited.
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
        prefetched, prefetched_after: keys that were resident on a guess alone when it began and when it ended.
        guesses: (layer, its experts that were guessed in this step, best first).
        arrived: reads that were handed out in this step, as they came.
        deferred: keys in flight, or queued in this step, that had been substituted.
    """

    __slots__ = (
        "arrived", "began_s", "deferred", "ended_s", "guesses", "layers", "number", "phase", "positions", "prefetched",
        "prefetched_after", "rows",
    )  # fmt: skip

    def __init__(
        self, number: int, phase: str, rows: int, positions: int, began_s: float, prefetched: Collection[int] = ()
    ) -> None:
        self.number = number
        self.phase = phase
        self.rows = rows
        self.positions = positions
        self.began_s = began_s
        self.ended_s = 0.0
        self.prefetched = prefetched
        self.prefetched_after: Collection[int] = ()
        # As of LayerRecord, which takes longer to make.
        self.layers: list[list[Any]] = []
        self.guesses: list[tuple[int, Sequence[int]]] = []
        self.arrived: list[Sequence[Completion]] = []
        self.deferred: list[int] = []


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
    reads, guessed, evicted = _reads_of(step, {key for layer in begun for key in layer.missing})
    demanded = {key for layer in begun for keys in (layer.found, layer.late, layer.stood_in) for key in keys}

    def is_gone(key: int) -> bool:
        return key not in step.prefetched_after if step.ended_s else state(key) == FREE

    wasted = evicted + [key for key in guessed if key not in demanded and is_gone(key)]
    in_time = [[key for key in layer.found if key in guessed] for layer in layers]
    return Digest(layers, in_time, reads, wasted)


def _reads_of(
    step: StepRecord, missing: Collection[int]
) -> tuple[list[tuple[int, int, float, float]], Collection[int], list[int]]:
    """The step's reads as of `Digest`; the keys that were resident on a guess; those that were evicted and read again.

    Args:
        missing: keys that were read on demand.
    """
    arrived = [one for some in list(step.arrived) for one in some]
    # A guess that was evicted before its layer came is read again, on demand: that is its last read in the step.
    last = {one.key: at for at, one in enumerate(arrived)}
    reads: list[tuple[int, int, float, float]] = []
    guessed = dict.fromkeys(step.prefetched)
    evicted: list[int] = []
    for at, one in enumerate(arrived):
        why = GUESS
        if one.key in missing and last[one.key] == at:
            why = DEMAND
        elif one.key in step.deferred:
            why = DEFERRED
        elif one.error is None:
            if one.key in guessed:
                # What was resident and is read again had been evicted.
                evicted.append(one.key)
            guessed[one.key] = None
        reads.append((one.key, why, one.begun_s, one.ended_s))
    return reads, guessed, evicted


class Recorder(StepObserver):
    """Keeps the last step and the one at hand. Made anew for each time of watching.

    Args:
        clock: the one that the readers time themselves by.

    Attributes:
        last: the last step that is over. current: the one that goes, or went last.
        timed_steps, timed_s: decode steps that followed on another one, and the seconds from begin to begin.
    """

    def __init__(self, pool: ExpertPool, clock: Callable[[], float] = time.perf_counter) -> None:
        self._residency = pool.residency
        self._clock = clock
        self._last_layer = len(pool.keys.widths) - 1
        self.last: StepRecord | None = None
        self.current: StepRecord | None = None
        self._step = StepRecord(0, "", 0, 0, 0.0)
        self.timed_steps, self.timed_s = 0, 0.0
        self._layer: list[Any] = [*LayerRecord(-1, (), (), (), (), 0.0, 0.0, ())]
        self._found: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])
        self._waits: list[tuple[float, float]] = []

    def begin_step(self, info: StepInfo) -> None:
        """See `StepObserver`."""
        now, before = self._clock(), self._step
        if before.phase == info.phase == "decode" and before.rows == info.num_rows:
            self.timed_steps += 1
            self.timed_s += now - before.began_s
        prefetched = tuple(self._residency.prefetched_ready)
        step = StepRecord(before.number + 1, info.phase, info.num_rows, info.num_positions, now, prefetched)
        if before.deferred:
            step.deferred = [key for key in before.deferred if key in self._residency.deferred]
        self._step = self.current = step

    def begin_layer(self, layer: int, routed: Sequence[Sequence[int]], weights: torch.Tensor) -> None:
        """See `StepObserver`."""
        self._found, self._waits = ([], [], [], []), []
        self._layer = [layer, *self._found, self._clock(), 0.0, self._waits]
        self._step.layers.append(self._layer)

    def looked_up(self, hits: Sequence[int], in_flight: Sequence[int], misses: Sequence[int]) -> None:
        """See `StepObserver`."""
        for known, keys in zip(self._found[:3], (hits, in_flight, misses), strict=True):
            known += keys

    def substituted(self, keys: Sequence[int]) -> None:
        """See `StepObserver`."""
        self._found[3].extend(keys)

    def end_layer(self) -> None:
        """See `StepObserver`."""
        self._layer[_ENDED] = ended = self._clock()
        if self._layer[0] == self._last_layer:
            step = self._step
            step.prefetched_after = tuple(self._residency.prefetched_ready)
            step.ended_s = ended
            self.last = self.current

    def stalled(self, began_s: float, ended_s: float) -> None:
        """See `StepObserver`."""
        self._waits.append((began_s, ended_s))

    def guessed(self, layer: int, experts: Sequence[int]) -> None:
        """See `StepObserver`."""
        self._step.guesses.append((layer, experts))

    def deferred(self, keys: Sequence[int]) -> None:
        """See `StepObserver`."""
        self._step.deferred += keys

    def arrived(self, completions: Sequence[Completion]) -> None:
        """See `StepObserver`."""
        self._step.arrived.append(completions)
