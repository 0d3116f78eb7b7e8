"""What others see of a step: the engine that a model calls, its predictor and observers, and the counts of a run."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Protocol, get_args

import torch

from foreroute.engine.approximation import Approximation
from foreroute.predict.governor import Governor
from foreroute.transfer.base import Completion

# The order of their counts in `EngineStats`.
Phase = Literal["prefill", "decode", "verify"]
PHASES: tuple[Phase, ...] = get_args(Phase)
# Positions of a row that a verify step has at most: its experts are pinned together, as a decoded token's are.
MOST_VERIFIED = 16


@dataclass(slots=True)
class PhaseStats:
    """Counts of one phase (prefill, decode or verify).

    steps: forward passes. tokens: positions computed, with a batch's padding but not that of a server's prompts, and
    with drafted tokens that were not accepted.
    prefetch_used / prefetch_wasted: prefetched experts that this phase demanded / evicted before any demand.
    hits / late_hits / misses: demanded experts that were resident / in flight / absent.
    demand_loads: experts read because a router asked. prefetch_loads: experts read because of a guess.
    layers / stalled_layers: MoE layers computed / those that waited for an expert. Not of prompts.
    first_waited: late hits and misses of a decode step's first MoE layer. Not of prompts.
    substituted: demanded experts that were substituted; not among hits, late hits and misses.
    deferred_loads: reads of substituted experts, for later tokens.
    steps_without_prefetch: decode steps in which the governor had switched prefetch off.
    stall_s: seconds in which compute waited for reads.
    """

    steps: int = 0
    tokens: int = 0
    hits: int = 0
    late_hits: int = 0
    misses: int = 0
    demand_loads: int = 0
    demand_bytes: int = 0
    prefetch_loads: int = 0
    prefetch_bytes: int = 0
    prefetch_cancelled: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    layers: int = 0
    stalled_layers: int = 0
    first_waited: int = 0
    substituted: int = 0
    deferred_loads: int = 0
    deferred_bytes: int = 0
    steps_without_prefetch: int = 0
    stall_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of demanded experts that were resident, 0 to 1; late hits do not count."""
        demanded = self.hits + self.late_hits + self.misses + self.substituted
        return self.hits / demanded if demanded else 0.0


@dataclass(slots=True)
class EngineStats:
    """Counters of each phase, and of the pool since the last reset.

    read_retries: reads that failed transiently (an I/O error, a stale handle), and were retried.
    """

    prefill: PhaseStats = field(default_factory=PhaseStats)
    decode: PhaseStats = field(default_factory=PhaseStats)
    verify: PhaseStats = field(default_factory=PhaseStats)
    evictions: int = 0
    read_bytes: int = 0
    read_s: float = 0.0
    read_retries: int = 0

    @property
    def phases(self) -> tuple[PhaseStats, ...]:
        """The counts of each phase, in the order of `PHASES`."""
        return (self.prefill, self.decode, self.verify)

    def of(self, phase: Phase) -> PhaseStats:
        """The counts of `phase`."""
        return self.phases[PHASES.index(phase)]

    @property
    def answers(self) -> PhaseStats:
        """The counts of answers: of decode and verify steps together."""
        return summed((self.decode, self.verify))

    @property
    def prefetch_used(self) -> int:
        """Prefetched experts that were demanded, in all phases."""
        return sum(phase.prefetch_used for phase in self.phases)

    @property
    def prefetch_wasted(self) -> int:
        """Prefetched experts that were evicted before any demand, in all phases."""
        return sum(phase.prefetch_wasted for phase in self.phases)

    def as_dict(self) -> dict[str, Any]:
        """All counters as a nested dict, for traces."""
        return asdict(self)

    def minus(self, earlier: "EngineStats") -> "EngineStats":
        """Return the counts between `earlier` and now."""
        return EngineStats(
            _difference(self.prefill, earlier.prefill),
            _difference(self.decode, earlier.decode),
            _difference(self.verify, earlier.verify),
            *(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)[len(PHASES) :]),
        )


def summed(phases: Sequence[PhaseStats]) -> PhaseStats:
    """The counts of several runs together."""
    return PhaseStats(*(sum(getattr(phase, f.name) for phase in phases) for f in fields(PhaseStats)))


def _difference(now: PhaseStats, earlier: PhaseStats) -> PhaseStats:
    return PhaseStats(*(getattr(now, f.name) - getattr(earlier, f.name) for f in fields(now)))


@dataclass(frozen=True, slots=True)
class StepInfo:
    """One forward pass of [num_rows, num_positions] tokens, as described by the loop that runs it.

    phase: "prefill" computes a prompt or a chunk of one, even of one token; "decode" one new token per row; "verify" a
        new token and those drafted after it, at most MOST_VERIFIED per row, of which some may be dropped afterwards.
    token_ids: [num_rows, num_positions] int64; None when embeddings are given instead.
    padding: [num_rows x num_positions] bool, True at padding, which experts skip; None: no padding.
    is_start: no step precedes it in its sequence.
    num_dropped: positions at the end of the step before that were dropped after it, as the model did not choose them.
    """

    phase: Phase
    num_rows: int
    num_positions: int
    token_ids: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    is_start: bool = False
    num_dropped: int = 0

    @classmethod
    def of(
        cls,
        phase: Phase,
        token_ids: torch.Tensor,
        padding: torch.Tensor | None = None,
        *,
        is_start: bool = False,
        num_dropped: int = 0,
    ) -> "StepInfo":
        """Make the `phase` step of `token_ids` [rows, positions]; the others as above."""
        num_rows, num_positions = token_ids.shape
        return cls(phase, num_rows, num_positions, token_ids, padding, is_start, num_dropped)

    @property
    def is_prefill(self) -> bool:
        """Whether the step computes a prompt, or a chunk of one."""
        return self.phase == "prefill"

    @property
    def num_tokens(self) -> int:
        """Number of positions without padding. Cost: a copy from device to host if there is padding."""
        num_padding = 0 if self.padding is None else int(self.padding.sum())
        return self.num_rows * self.num_positions - num_padding


class MoeEngine(Protocol):
    """The engine of a loaded model: `MoeStep` on the host, `DeviceTier` on a GPU that pages for itself.

    Attributes:
        policies: how decoding treats misses. governor: decides how much is prefetched; None: not governed.
    """

    @property
    def policies(self) -> Approximation: ...

    @property
    def governor(self) -> Governor | None: ...

    @property
    def is_prefill(self) -> bool:
        """Whether the current (or last) step computes a prompt."""

    def begin_step(self, info: StepInfo) -> None:
        """Begin a forward pass.

        Raises:
            PolicyError: policies were set for another number of rows.
        """

    def compute(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute the weighted sum [tokens, hidden] of the routed experts of MoE layer `layer`.

        Args:
            hidden: [tokens, hidden]. weights: [tokens, k].
            ids: [tokens, k] int64; those out of the layer's range are ignored.
        """

    def snapshot(self) -> EngineStats:
        """Return a copy of all counts since the model was loaded."""

    def close(self) -> None:
        """Stop the readers and free the pool; experts cannot be computed afterwards."""


class PrefetchSource(Protocol):
    """Guesses the experts of the next MoE layer from one layer's router input and routing, as plain lists."""

    def guess(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Sequence[int]:
        """Return expert ids of MoE layer `layer + 1`, distinct, best first; empty without a guess.

        hidden: [tokens, hidden], the router's input. ids, weights: [tokens, k], its routing.
        """

    def guess_first(self, token_ids: torch.Tensor, num_rows: int | None = None) -> Sequence[int]:
        """Return expert ids of a decode step's first MoE layer for its `token_ids` [rows x positions], as above.

        num_rows: as many as tokens, if None.
        """

    def see_first(self, hidden: torch.Tensor, num_rows: int, *, goes_on: bool = False) -> None:
        """Take the router input `hidden` [num_rows x positions, hidden] of that layer, in every step.

        goes_on: several positions follow those before; else they begin a text.
        """

    def drop_last(self, count: int) -> None:
        """Forget the last `count` positions of each row, which `see_first` was given: the text goes on without them."""


class StepObserver:
    """Callbacks for what a step does, called on the engine's thread as it happens; subclasses override some.

    An observer must change nothing, and an error that it raises ends the step. Keys are expert keys.
    """

    def begin_step(self, info: StepInfo) -> None:
        """A forward pass begins."""

    def begin_layer(self, layer: int, routed: Sequence[Sequence[int]], weights: torch.Tensor) -> None:
        """MoE layer `layer` begins. routed: per token its expert keys, negative: none. weights: [tokens, k]."""

    def looked_up(self, hits: Sequence[int], in_flight: Sequence[int], misses: Sequence[int]) -> None:
        """Demanded keys: hits, in_flight (late hits), misses. Called again for those that arrive before substitute."""

    def substituted(self, keys: Sequence[int]) -> None:
        """These demanded experts were substituted."""

    def guessed(self, layer: int, experts: Sequence[int]) -> None:
        """These experts of `layer` were guessed, best first; those that are absent are prefetched."""

    def deferred(self, keys: Sequence[int]) -> None:
        """Deferred loads of these substituted experts were queued."""

    def arrived(self, completions: Sequence[Completion]) -> None:
        """These reads have completed or failed."""

    def stalled(self, began_s: float, ended_s: float) -> None:
        """Compute waited for reads from `began_s` to `ended_s` of the engine's clock."""

    def governed(self, share: float, why: str) -> None:
        """The governor prefetches this `share` of the full width from now on; `why` in one word."""

    def end_layer(self) -> None:
        """The layer's experts have been computed."""

    def end(self, stats: EngineStats) -> None:
        """The model is closed."""


# Called at the start of a layer's step, with (layer, hidden, ids, weights).
RoutingListener = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
