"""Record the engine's current step in memory while anyone watches.

A `Recorder` is an observer of the pool (`ExpertPool.add_observer`). The engine's thread only notes the calls; readers
interpret a `StepRecord` (`digest`) in the server's thread, a few times a second. Notes never change afterwards, so a
reader needs no lock: at worst it sees a layer more or less. Cost: measured by benchmarks/live_cost.py.
"""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch

from foreroute.engine.interfaces import StepInfo, StepObserver
from foreroute.engine.pool import ExpertPool
from foreroute.residency.slots import FREE
from foreroute.transfer.base import Completion

DEMAND, PREFETCH, DEFERRED = range(3)
# Index of the field of a LayerRecord that is written last.
_ENDED = 6


class LayerRecord(NamedTuple):
    """One MoE layer of a step. Keys are expert keys; times are by the clock, in seconds.

    hits, late_hits, misses: demanded experts that were resident, in flight, absent.
    substituted: demanded experts that were not waited for. waits: (began, ended) of each stall. ended_s: 0 until then.
    """

    layer: int
    hits: Sequence[int]
    late_hits: Sequence[int]
    misses: Sequence[int]
    substituted: Sequence[int]
    began_s: float
    ended_s: float
    waits: Sequence[tuple[float, float]]


class StepRecord:
    """One forward pass as observed, during and after it.

    Attributes:
        number: counted from when the recorder was attached. phase: "prefill", "decode" or "verify".
        ended_s: when its last MoE layer was computed; 0 until then.
        prefetched, prefetched_after: keys with an unused prefetch that were resident at its begin and its end.
        guesses: (layer, its experts guessed in this step, best first).
        arrived: reads completed in this step, in order of completion.
        deferred: keys of deferred loads in flight, or queued in this step.
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
        # Fields as in LayerRecord, which is slower to build.
        self.layers: list[list[Any]] = []
        self.guesses: list[tuple[int, Sequence[int]]] = []
        self.arrived: list[Sequence[Completion]] = []
        self.deferred: list[int] = []


class Digest(NamedTuple):
    """A step's record, interpreted.

    layers: those that have ended. in_time: for each of them, its hits that were prefetched.
    reads: (key, why, began, ended) of the reads completed in the step, in order.
    wasted: keys that were prefetched, and evicted in the step before any demand.
    """

    layers: Sequence[LayerRecord]
    in_time: Sequence[Collection[int]]
    reads: Sequence[tuple[int, int, float, float]]
    wasted: Sequence[int]


def digest(step: StepRecord, state: Callable[[int], int]) -> Digest:
    """Interpret `step`, from any thread, during or after it. state: of a key, in the pool now."""
    begun = [LayerRecord(*layer) for layer in list(step.layers)]
    layers = [layer for layer in begun if layer.ended_s]
    reads, prefetched, evicted = _reads_of(step, {key for layer in begun for key in layer.misses})
    demanded = {key for layer in begun for keys in (layer.hits, layer.late_hits, layer.substituted) for key in keys}

    def is_gone(key: int) -> bool:
        return key not in step.prefetched_after if step.ended_s else state(key) == FREE

    wasted = evicted + [key for key in prefetched if key not in demanded and is_gone(key)]
    in_time = [[key for key in layer.hits if key in prefetched] for layer in layers]
    return Digest(layers, in_time, reads, wasted)


def _reads_of(
    step: StepRecord, missing: Collection[int]
) -> tuple[list[tuple[int, int, float, float]], Collection[int], list[int]]:
    """Return the step's reads as in `Digest`, the keys resident by unused prefetch, and those evicted and read again.

    Args:
        missing: keys read on demand.
    """
    arrived = [one for some in list(step.arrived) for one in some]
    # A prefetch that was evicted before its layer is read again on demand: its last read in the step.
    last = {one.key: at for at, one in enumerate(arrived)}
    reads: list[tuple[int, int, float, float]] = []
    prefetched = dict.fromkeys(step.prefetched)
    evicted: list[int] = []
    for at, one in enumerate(arrived):
        why = PREFETCH
        if one.key in missing and last[one.key] == at:
            why = DEMAND
        elif one.key in step.deferred:
            why = DEFERRED
        elif one.error is None:
            if one.key in prefetched:
                # It was resident and is read again, so it had been evicted.
                evicted.append(one.key)
            prefetched[one.key] = None
        reads.append((one.key, why, one.begun_s, one.ended_s))
    return reads, prefetched, evicted


class Recorder(StepObserver):
    """Keeps the last step and the current one. Made anew each time watching starts.

    Args:
        clock: the one that times the reads.

    Attributes:
        last: the last step that has ended. current: the one that runs, or ran last.
        timed_steps, timed_s: decode steps that directly followed another one, and the seconds from begin to begin.
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
        """See `StepObserver`; weights [tokens, k]."""
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
