"""Forecast TPOT: arithmetic on speeds measured here and miss rates measured elsewhere. No model here."""

from collections.abc import Sequence
from dataclasses import dataclass

# Shares of the experts in memory, and the share of demanded experts that then miss; interpolated linearly.
_SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
_MISS_RATES = {
    "belady": (1.0, 0.528, 0.329, 0.139, 0.055, 0.0),
    "lfu": (1.0, 0.744, 0.548, 0.273, 0.102, 0.0),
    "lru": (1.0, 0.828, 0.612, 0.329, 0.118, 0.0),
}

ASSUMPTIONS = (
    "Miss rates, by the share of experts in memory, are those measured on one small trained model (8 layers x 32 "
    "experts, top-4). Yours may differ: `foreroute generate` shows it.",
    "One sequence, a short context. Wasted prefetches are not counted.",
    "A range goes from reads that overlap compute fully to reads that do not overlap it.",
)


@dataclass(frozen=True)
class Forecast:
    """One forecast: experts that a token must load, the cost of that, and the TPOT range that follows.

    tpot_ms_low: reads and compute overlap fully. tpot_ms_high: they do not overlap.
    """

    name: str
    miss_rate: float
    misses_per_token: float
    read_mb_per_token: float
    read_ms_per_token: float
    tpot_ms_low: float
    tpot_ms_high: float


def forecast(
    resident_share: float,
    demand_experts: int,
    expert_bytes: int,
    bytes_per_s: float,
    compute_ms: float,
    eviction: str = "lfu",
) -> tuple[Forecast, ...]:
    """Forecast three cases, best first: Belady's miss rate (the fewest misses), that of `eviction`, and no hits at all.

    Args:
        resident_share: share of the experts that the pool holds, 0 to 1; 0 also without a cache.
        demand_experts: distinct experts that one token uses, each of expert_bytes, read at bytes_per_s.
        compute_ms: time to compute one token whose experts are resident.
    """
    miss_rates = {
        "best": _interpolated(resident_share, _MISS_RATES["belady"]),
        "likely": _interpolated(resident_share, _MISS_RATES[eviction]),
        "worst": 0.0 if resident_share >= 1 else 1.0,
    }
    cases = []
    for name, miss_rate in miss_rates.items():
        misses = miss_rate * demand_experts
        read_ms = misses * expert_bytes / bytes_per_s * 1e3
        low, high = max(compute_ms, read_ms), compute_ms + read_ms
        cases.append(Forecast(name, miss_rate, misses, misses * expert_bytes / 1e6, read_ms, low, high))
    return tuple(cases)


def _interpolated(share: float, rates: Sequence[float]) -> float:
    for left, right, at_left, at_right in zip(_SHARES, _SHARES[1:], rates, rates[1:], strict=False):
        if share <= right:
            return at_left + (at_right - at_left) * (share - left) / (right - left)
    return rates[-1]
