"""A recorded run as plain data: what docs/trace.md says of each event, and the steps that they make up."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Header:
    """What was run. Lists have one entry per MoE layer; bytes are those of the codec in use.

    num_slots slots of slot_bytes hold experts, staging_slots of them are open to guesses.
    """

    model: str
    model_type: str
    fingerprint: str
    experts_per_layer: tuple[int, ...]
    top_k: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    num_slots: int
    slot_bytes: int
    staging_slots: int
    codec: str
    eviction: str
    prefetch: str
    policy: str

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.experts_per_layer)

    @property
    def num_experts(self) -> int:
        """Experts of all layers: a slot for each would hold the whole model."""
        return sum(self.experts_per_layer)


@dataclass(frozen=True, slots=True)
class LayerDone:
    """A layer's experts were computed, between begun_s and end_s; each demanded one is in one of the four lists."""

    begun_s: float
    end_s: float
    layer: int
    hits: tuple[int, ...]
    late: tuple[int, ...]
    misses: tuple[int, ...]
    stood_in: tuple[int, ...]

    @property
    def demanded(self) -> tuple[int, ...]:
        """All of them."""
        return self.hits + self.late + self.misses + self.stood_in


@dataclass(frozen=True, slots=True)
class Stall:
    """Compute waited for bytes."""

    begun_s: float
    end_s: float
    layer: int


@dataclass(frozen=True, slots=True)
class GuessMade:
    """A guess of a layer's experts, best first."""

    at_s: float
    layer: int
    experts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadDone:
    """An expert has arrived, or failed to (error is then its text)."""

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
    """A queued load was withdrawn."""

    at_s: float
    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class Evicted:
    """An expert has lost its slot."""

    at_s: float
    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class Governed:
    """Guesses were widened, narrowed or switched: `share` of the full width, 0 is off."""

    at_s: float
    share: float
    why: str


@dataclass(slots=True)
class RecordedStep:
    """One forward pass: a prompt's chunk ("prefill"), or a token for each of `rows` texts ("decode").

    is_start: the first pass of a text. layers, guesses, stalls: in the order in which they happened.
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
        """A step that the cache serves."""
        return self.phase == "decode"

    @property
    def end_s(self) -> float:
        """When its last layer was computed; what follows (the head, sampling) is not in it."""
        return self.layers[-1].end_s if self.layers else self.begun_s

    @property
    def stall_s(self) -> float:
        """Seconds in which compute waited for bytes."""
        return sum(stall.end_s - stall.begun_s for stall in self.stalls)


TraceEvent = RecordedStep | LayerDone | Stall | GuessMade | LoadDone | Cancelled | Evicted | Governed


@dataclass(frozen=True)
class Recording:
    """A whole trace.

    steps: those that ran through all layers. num_broken: the others (an error or Ctrl-C cut them off).
    events: everything, in the order of the file. stats: the engine's own counts; empty where the file was cut off.
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
        """The steps that the cache serves, in their order."""
        return [step for step in self.steps if step.is_decode]
