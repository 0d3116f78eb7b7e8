"""Score the guesses of the recorded run: the recall of demanded experts, and the outcomes of prefetches."""

from collections import Counter
from dataclasses import dataclass

from foreroute.report.events import Cancelled, Evicted, LayerDone, LoadDone, RecordedStep, Recording


@dataclass(frozen=True)
class LayerUse:
    """One layer over the decode steps.

    uses, hits: per expert, times demanded and found resident. guessed: those of the `steps` with a guess for it.
    recall: share of those steps' demanded experts that the guess named; None without guesses. width: mean number of
    experts named. found: of those named rightly, the share that was resident in time.
    """

    layer: int
    steps: int
    uses: tuple[int, ...]
    hits: tuple[int, ...]
    guessed: int
    recall: float | None
    width: float | None
    found: float | None


@dataclass(frozen=True)
class Fates:
    """Prefetches started in decode, by outcome.

    in_time: resident when the token that they were guessed for demanded them. late_hits: then in flight. later: by a
    later token. wasted: evicted before any demand. open: not demanded by the end. cancelled: in the queue, never
    read; not among the others.
    """

    in_time: int
    late_hits: int
    later: int
    wasted: int
    open: int
    cancelled: int

    @property
    def loads(self) -> int:
        """Number of prefetches that were read."""
        return self.in_time + self.late_hits + self.later + self.wasted + self.open


def layers_of(recording: Recording) -> list[LayerUse]:
    """Compute every layer's use over all decode steps."""
    header = recording.header
    uses = [[0] * width for width in header.experts_per_layer]
    hits = [[0] * width for width in header.experts_per_layer]
    guessed: Counter[int] = Counter()
    named: Counter[int] = Counter()
    demanded: Counter[int] = Counter()
    right: Counter[int] = Counter()
    in_time: Counter[int] = Counter()
    for step in recording.decode_steps:
        guesses = {guess.layer: set(guess.experts) for guess in step.guesses}
        for done in step.layers:
            for expert in done.demanded:
                uses[done.layer][expert] += 1
            for expert in done.hits:
                hits[done.layer][expert] += 1
            if done.layer in guesses:
                guess = guesses[done.layer]
                guessed[done.layer] += 1
                named[done.layer] += len(guess)
                demanded[done.layer] += len(done.demanded)
                right[done.layer] += len(guess.intersection(done.demanded))
                in_time[done.layer] += len(guess.intersection(done.hits))
    num_steps = len(recording.decode_steps)
    return [
        LayerUse(
            layer,
            num_steps,
            tuple(uses[layer]),
            tuple(hits[layer]),
            guessed[layer],
            right[layer] / demanded[layer] if demanded[layer] else None,
            named[layer] / guessed[layer] if guessed[layer] else None,
            in_time[layer] / right[layer] if right[layer] else None,
        )
        for layer in range(header.num_layers)
    ]


IN_TIME, LATE_HIT, LATER, WASTED, OPEN = "in_time", "late_hit", "later", "wasted", "open"


def fate_of_loads(recording: Recording) -> dict[int, str]:
    """Outcome of every prefetch that a decode step started, by the load's id()."""
    fates: dict[int, str] = {}
    # Per layer, expert -> load. Those in `passed` were not demanded when their layer was computed.
    staged: list[dict[int, int]] = [{} for _ in recording.header.top_k]
    passed: set[int] = set()
    decode_from = next((step.begun_s for step in recording.decode_steps), 0.0)
    is_decode = False
    for event in recording.events:
        if isinstance(event, RecordedStep):
            is_decode = event.is_decode
        elif isinstance(event, LoadDone):
            if event.why == "prefetch" and event.error is None and is_decode and event.asked_s >= decode_from:
                staged[event.layer][event.expert] = id(event)
                fates[id(event)] = OPEN
        elif isinstance(event, LayerDone):
            for fate, experts in ((IN_TIME, event.hits), (LATE_HIT, event.late_hits)):
                for expert in experts:
                    load = staged[event.layer].pop(expert, None)
                    if load is not None:
                        fates[load] = LATER if load in passed else fate
            passed.update(staged[event.layer].values())
        elif isinstance(event, Evicted):
            load = staged[event.layer].pop(event.expert, None)
            if load is not None:
                fates[load] = WASTED
    return fates


def fates_of(recording: Recording) -> Fates:
    """Count the outcomes of the prefetches that decode steps started."""
    counts = Counter(fate_of_loads(recording).values())
    is_decode = False
    num_cancelled = 0
    for event in recording.events:
        if isinstance(event, RecordedStep):
            is_decode = event.is_decode
        elif isinstance(event, Cancelled):
            num_cancelled += is_decode
    return Fates(counts[IN_TIME], counts[LATE_HIT], counts[LATER], counts[WASTED], counts[OPEN], num_cancelled)
