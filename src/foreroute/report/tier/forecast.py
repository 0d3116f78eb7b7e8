"""Forecast a recorded run on another memory tier, at several budgets: simulation.py fed from a trace."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import isfinite
from statistics import median
from typing import Any

from foreroute.errors import TraceError
from foreroute.report.events import RecordedStep, Recording
from foreroute.report.route import RecordedRoute, pool_of
from foreroute.report.tier.simulation import Simulated, Tier, TierSimulation
from foreroute.residency.eviction import eviction_of

_GIGA = 1e9
TIER_HELP = (
    "LINK,HBM[,DENSE[,LAYER]]: GB/s of the link that copies experts, GB/s of the memory that computes, GB of dense "
    "weights and keys and values read per token (0), microseconds per layer beside that (0); or LINK alone, with "
    "compute as recorded"
)


@dataclass(frozen=True)
class TierForecast:
    """What a budget gives: seconds and bytes of a step without and with the recorded guesses prefetched.

    resident_s: of a step if every expert were resident.
    """

    memory: str
    num_slots: int
    on_demand: Simulated
    prefetched: Simulated | None
    resident_s: float


def parse_tier(text: str, recording: Recording) -> Tier:
    """Read `--tier` (TIER_HELP).

    Raises:
        TraceError: it is none of the two forms, or a number is not above 0.
    """
    parts = text.split(",")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 4 or not (min(numbers[:2]) > 0 and min(numbers) >= 0 and isfinite(sum(numbers))):
        raise TraceError(
            f"--tier {text!r} is not understood. It takes {TIER_HELP}: --tier 25.7,768 is a GPU behind PCIe 4."
        )
    if len(numbers) == 1:
        return recorded_tier(recording, numbers[0] * _GIGA)
    link, memory, dense, layer_us = (*numbers, 0.0, 0.0)[:4]
    layers = recording.header.num_layers
    before_s = dense * _GIGA / (memory * _GIGA) / layers + layer_us * 1e-6
    return Tier(
        link * _GIGA, (before_s,) * layers, tuple(size / (memory * _GIGA) for size in recording.header.expert_bytes)
    )


def recorded_tier(recording: Recording, link_bytes_per_s: float) -> Tier:
    """The tier whose compute is that of the recorded run (medians over decode steps), without its stalls."""
    steps = recording.decode_steps
    layers = range(recording.header.num_layers)
    before: list[list[float]] = [[] for _ in layers]
    expert: list[list[float]] = [[] for _ in layers]
    for step in steps:
        last_s = step.begun_s
        stalls = [0.0 for _ in layers]
        for stall in step.stalls:
            stalls[stall.layer] += stall.end_s - stall.begun_s
        for done in step.layers:
            before[done.layer].append(max(0.0, done.begun_s - last_s))
            if done.demanded:
                seconds = done.end_s - done.begun_s - stalls[done.layer]
                expert[done.layer].append(max(0.0, seconds) / len(done.demanded))
            last_s = done.end_s
    begun = [event for event in recording.events if isinstance(event, RecordedStep)]
    after = [
        second.begun_s - first.end_s
        for first, second in pairwise(begun)
        if first.is_decode and second.is_decode and first.layers and not second.is_start
    ]
    return Tier(
        link_bytes_per_s,
        tuple(median(times) if times else 0.0 for times in before),
        tuple(median(times) if times else 0.0 for times in expert),
        max(0.0, median(after)) if after else 0.0,
    )


def forecasts(
    recording: Recording, route: RecordedRoute, tier: Tier, memories: Sequence[str | int]
) -> list[TierForecast]:
    """TierForecast every budget.

    Raises:
        TraceError: the layers' slots have several lengths, which is not simulated. BudgetError: as of `pool_of`.
    """
    if len(set(route.lengths)) > 1:
        raise TraceError("--tier simulates one pool; this model's layers have experts of several sizes.")
    guesses = [_guesses_of(step, route) for step in recording.decode_steps]
    none: list[list[tuple[int, ...]]] = [[() for _ in route.top_k] for _ in guesses]
    found = []
    for memory in memories:
        slots = pool_of(route, memory)
        (pool,) = slots.classes

        def simulated(told: Sequence[Sequence[tuple[int, ...]]], num_slots: int, staging: int) -> Simulated:
            simulation = TierSimulation(
                tier,
                route.expert_bytes,
                route.num_keys,
                route.keys_per_layer,
                num_slots,
                eviction_of(recording.header.eviction),
                staging_slots=staging,
            )
            return simulation.run(route.steps, told, route.warm_up)

        on_demand = simulated(none, slots.num_slots, 0)
        is_guessed = any(any(step) for step in guesses)
        prefetched = simulated(guesses, slots.num_slots, pool.staging_slots) if is_guessed else None
        found.append(TierForecast(str(memory), slots.num_slots, on_demand, prefetched, _resident_s(tier, route)))
    return found


def _guesses_of(step: RecordedStep, route: RecordedRoute) -> list[tuple[int, ...]]:
    guesses: list[tuple[int, ...]] = [() for _ in route.top_k]
    for guess in step.guesses:
        guesses[guess.layer] = tuple(guess.layer * route.keys_per_layer + expert for expert in guess.experts)
    return guesses


def _resident_s(tier: Tier, route: RecordedRoute) -> float:
    steps = route.steps[route.warm_up :]
    experts = sum(len(keys) * tier.expert_s[layer] for step in steps for layer, keys in enumerate(step))
    return sum(tier.before_s) + tier.after_s + experts / len(steps)


def as_dicts(found: Sequence[TierForecast]) -> list[dict[str, Any]]:
    """The forecasts for --json: seconds and bytes of a step."""
    return [asdict(one) for one in found]
