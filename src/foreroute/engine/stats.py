"""Counters of a run: hits and misses, prefetches, bytes read, stalls."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(slots=True)
class PhaseStats:
    """Counts of one phase (prefill or decode).

    steps: forward passes. tokens: positions computed, with a batch's padding but not that of a server's prompts.
    prefetch_used / prefetch_wasted: prefetched experts that this phase demanded / evicted before any demand.
    hits / late_hits / misses: demanded experts that were resident / in flight / absent.
    demand_loads: experts read because a router asked. prefetch_loads: experts read because of a guess.
    layers / stalled_layers: MoE layers computed / those that waited for an expert. Decode alone.
    first_waited: late hits and misses of layer 0. Decode alone.
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
    """Counters of both phases, and of the pool since the last reset.

    read_retries: reads that failed transiently (an I/O error, a stale handle), and were retried.
    """

    prefill: PhaseStats = field(default_factory=PhaseStats)
    decode: PhaseStats = field(default_factory=PhaseStats)
    evictions: int = 0
    read_bytes: int = 0
    read_s: float = 0.0
    read_retries: int = 0

    @property
    def prefetch_used(self) -> int:
        """Prefetched experts that were demanded, in both phases."""
        return self.prefill.prefetch_used + self.decode.prefetch_used

    @property
    def prefetch_wasted(self) -> int:
        """Prefetched experts that were evicted before any demand, in both phases."""
        return self.prefill.prefetch_wasted + self.decode.prefetch_wasted

    def as_dict(self) -> dict[str, Any]:
        """All counters as a nested dict, for --json."""
        return asdict(self)

    def minus(self, earlier: "EngineStats") -> "EngineStats":
        """Return the counts between `earlier` and now."""
        return EngineStats(
            _difference(self.prefill, earlier.prefill),
            _difference(self.decode, earlier.decode),
            *(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)[2:]),
        )


def _difference(now: PhaseStats, earlier: PhaseStats) -> PhaseStats:
    return PhaseStats(*(getattr(now, f.name) - getattr(earlier, f.name) for f in fields(now)))
