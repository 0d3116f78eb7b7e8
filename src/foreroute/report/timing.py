"""Measure times of the recorded run, and estimate those at other budgets: plain arithmetic on a trace's times."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from foreroute.report.events import LoadDone, RecordedStep, Recording
from foreroute.report.offline import Outcome


@dataclass(frozen=True)
class Timing:
    """Means over the counted decode steps of the recorded run.

    step_ms: from one step's begin to the next's, which is the TPOT. stall_ms: of it, waiting for reads. compute_ms: the
    rest. bytes_per_s: of its reads, or as given; None where nothing was read.
    rows: tokens per step.
    """

    step_ms: float
    stall_ms: float
    bytes_per_s: float | None
    is_bandwidth_given: bool
    rows: float

    @property
    def compute_ms(self) -> float:
        """Milliseconds of a step without stalls."""
        return max(self.step_ms - self.stall_ms, 0.0)

    def read_ms(self, outcome: Outcome) -> float | None:
        """Milliseconds to read one step's misses."""
        if self.bytes_per_s is None:
            return None if outcome.misses else 0.0
        return outcome.bytes_per_token * self.rows / self.bytes_per_s * 1e3

    def tpot_ms(self, outcome: Outcome) -> tuple[float, float] | None:
        """TPOT in ms if reads and compute overlapped fully, and if they did not overlap at all."""
        read_ms = self.read_ms(outcome)
        return None if read_ms is None else (max(self.compute_ms, read_ms), self.compute_ms + read_ms)


@dataclass(frozen=True)
class Recorded:
    """The engine's counts in the counted steps. Bytes are those of loads requested in them, per token."""

    num_slots: int
    hits: int
    late_hits: int
    misses: int
    substituted: int
    tokens: int
    demand_bytes: float
    prefetch_bytes: float
    deferred_bytes: float

    @property
    def demanded(self) -> int:
        """Experts that the routers demanded."""
        return self.hits + self.late_hits + self.misses + self.substituted

    @property
    def bytes_per_token(self) -> float:
        """Bytes of all reads."""
        return self.demand_bytes + self.prefetch_bytes + self.deferred_bytes


def durations(recording: Recording) -> list[float]:
    """Seconds of each decode step: to the next step of the same text, else to the end of its last layer."""
    begun = [event for event in recording.events if isinstance(event, RecordedStep)]
    following = {id(step): after for step, after in pairwise(begun)}
    seconds = []
    for step in recording.decode_steps:
        after = following.get(id(step))
        goes_on = after is not None and after.is_decode and after.rows == step.rows
        seconds.append(after.begun_s - step.begun_s if after is not None and goes_on else step.end_s - step.begun_s)
    return seconds


def timing_of(recording: Recording, warm_up: int, bytes_per_s: float | None = None) -> Timing:
    """Means of `recording` after `warm_up` decode steps. bytes_per_s: given, or bytes read over the time it took."""
    steps = recording.decode_steps[warm_up:]
    is_given = bytes_per_s is not None
    if bytes_per_s is None:
        loads = _loads_of(recording, steps) or [event for event in recording.events if isinstance(event, LoadDone)]
        read_s = sum(load.end_s - load.begun_s for load in loads)
        bytes_per_s = sum(load.nbytes for load in loads) / read_s if read_s > 0 else None
    return Timing(
        step_ms=1e3 * fmean(durations(recording)[warm_up:]),
        stall_ms=1e3 * fmean(step.stall_s for step in steps),
        bytes_per_s=bytes_per_s or None,
        is_bandwidth_given=is_given,
        rows=fmean(step.rows for step in steps),
    )


def recorded_of(recording: Recording, warm_up: int) -> Recorded:
    """Count hits, misses and reads of `recording` after `warm_up` decode steps."""
    steps = recording.decode_steps[warm_up:]
    tokens = sum(step.rows for step in steps)
    loads = _loads_of(recording, steps)
    layers = [done for step in steps for done in step.layers]

    def read(why: str) -> float:
        return sum(load.nbytes for load in loads if load.why == why) / tokens

    return Recorded(
        recording.header.num_slots,
        hits=sum(len(done.hits) for done in layers),
        late_hits=sum(len(done.late_hits) for done in layers),
        misses=sum(len(done.misses) for done in layers),
        substituted=sum(len(done.substituted) for done in layers),
        tokens=tokens,
        demand_bytes=read("demand"),
        prefetch_bytes=read("prefetch"),
        deferred_bytes=read("deferred"),
    )


def _loads_of(recording: Recording, steps: list[RecordedStep]) -> list[LoadDone]:
    """List the loads that were requested during these steps."""
    begun = [event for event in recording.events if isinstance(event, RecordedStep)]
    starts = [step.begun_s for step in begun]
    asking = {id(step) for step in steps}
    found = []
    for event in recording.events:
        if isinstance(event, LoadDone) and event.error is None:
            at = bisect_right(starts, event.asked_s) - 1
            if at >= 0 and id(begun[at]) in asking:
                found.append(event)
    return found
