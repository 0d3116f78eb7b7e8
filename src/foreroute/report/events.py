"""A recorded run as plain data: the events of docs/trace.md, and the steps that they form."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from foreroute.types import SlotClass


@dataclass(frozen=True)
class Header:
    """The model and pool of the run. Lists have one entry per MoE layer; bytes are those of the codec in use.

    num_slots slots of slot_bytes hold experts; up to staging_slots of them may hold unused prefetches. Where layers'
    experts differ in size, slot_bytes is the longest slot's, layer_slot_bytes is each layer's, and class_slots counts
    the slots by length, the longest first; traces that lack these have slots of one length.
    """

    model: str
    model_type: str
    fingerprint: str
    experts_per_layer: tuple[int, ...]
    top_k: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    num_slots: int
    slot_bytes: int
    layer_slot_bytes: tuple[int, ...]
    class_slots: tuple[int, ...]
    staging_slots: int
    codec: str
    eviction: str
    prefetch: str
    policy: str

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return len(self.experts_per_layer)

    @property
    def classes(self) -> tuple[SlotClass, ...]:
        """The recorded pool, by slot length."""
        return tuple(
            SlotClass(length, num_slots, tuple(at for at, own in enumerate(self.layer_slot_bytes) if own == length), 0)
            for length, num_slots in zip(_lengths(self.layer_slot_bytes), self.class_slots, strict=True)
        )

    @property
    def describes_a_pool(self) -> bool:
        """Whether there are slots, and every expert fits one of its layer's."""
        fit = all(own >= stored for own, stored in zip(self.layer_slot_bytes, self.expert_bytes, strict=True))
        lengths = _lengths(self.layer_slot_bytes)
        counts = len(lengths) == len(self.class_slots) and sum(self.class_slots) == self.num_slots
        return fit and counts and lengths[0] == self.slot_bytes and min(self.class_slots) >= 1

    @property
    def num_experts(self) -> int:
        """Experts over all layers: with a slot for each, all are resident."""
        return sum(self.experts_per_layer)


def _lengths(of_layers: Iterable[int]) -> list[int]:
    """The slot lengths, the longest first."""
    return sorted(set(of_layers), reverse=True)


@dataclass(frozen=True, slots=True)
class LayerDone:
    """A layer's experts were computed, from begun_s to end_s; each demanded one is in one of the four lists."""

    begun_s: float
    end_s: float
    layer: int
    hits: tuple[int, ...]
    late_hits: tuple[int, ...]
    misses: tuple[int, ...]
    substituted: tuple[int, ...]

    @property
    def demanded(self) -> tuple[int, ...]:
        """All demanded experts."""
        return self.hits + self.late_hits + self.misses + self.substituted


@dataclass(frozen=True, slots=True)
class Stall:
    """Compute waited for reads."""

    begun_s: float
    end_s: float
    layer: int


@dataclass(frozen=True, slots=True)
class GuessMade:
    """The guess of a layer's experts, best first."""

    at_s: float
    layer: int
    experts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadDone:
    """A read has completed, or failed (error is then its message)."""

    layer: int
    expert: int
    why: str
    asked_s: float
    begun_s: float
    end_s: float
    nbytes: int
    error: str | None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A queued load was cancelled."""

    at_s: float
    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class Evicted:
    """An expert was evicted."""

    at_s: float
    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class Governed:
    """The governor changed the prefetch width: `share` of the full width, 0 is off."""

    at_s: float
    share: float
    why: str


@dataclass(slots=True)
class RecordedStep:
    """One forward pass: a prompt's chunk ("prefill"), a token for each of `rows` texts ("decode"), or a token and those
    drafted after it ("verify").

    is_start: the first pass of a text. layers, guesses, stalls: in the order of the events.
    """

    begun_s: float
    phase: str
    rows: int
    positions: int
    is_start: bool
    layers: list[LayerDone] = field(default_factory=list)
    guesses: list[GuessMade] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)

    @property
    def is_decode(self) -> bool:
        """Whether this is a decode step, which the cache serves."""
        return self.phase == "decode"

    @property
    def end_s(self) -> float:
        """When its last layer was computed; the head and sampling, which follow, are not included."""
        return self.layers[-1].end_s if self.layers else self.begun_s

    @property
    def stall_s(self) -> float:
        """Seconds of stall."""
        return sum(stall.end_s - stall.begun_s for stall in self.stalls)


TraceEvent = RecordedStep | LayerDone | Stall | GuessMade | LoadDone | Cancelled | Evicted | Governed


@dataclass(frozen=True)
class Recording:
    """A whole trace.

    steps: those that ran through all layers. num_broken: the others (ended by an error or Ctrl-C).
    events: all of them, in file order. stats: the engine's own counts; empty where the file was cut off.
    """

    path: str
    header: Header
    steps: tuple[RecordedStep, ...]
    num_broken: int
    events: tuple[TraceEvent, ...]
    stats: dict[str, Any]
    is_whole: bool

    @property
    def decode_steps(self) -> list[RecordedStep]:
        """The decode steps, in order."""
        return [step for step in self.steps if step.is_decode]
