"""Combine a recorded run with replays under other evictions and budgets: the content of tables, plots and pages."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from foreroute.errors import BudgetError, TraceError
from foreroute.report.events import Recording
from foreroute.report.guesses import Fates, LayerUse, fates_of, layers_of
from foreroute.report.offline import BELADY, Outcome, replays, sum_of
from foreroute.report.route import RecordedRoute, pool_of, route_of, smallest_pool, too_few
from foreroute.report.timing import Recorded, Timing, recorded_of, timing_of
from foreroute.units import NO_VALUE, megabytes, number, percent, span

DEFAULT_SHARES = ("12.5%", "25%", "37.5%", "50%", "75%", "100%")


@dataclass(frozen=True)
class Budget:
    """One pool, and every policy's outcome in it. is_recorded: it is the recorded run's pool."""

    num_slots: int
    pool_bytes: int
    share: float
    is_recorded: bool
    outcomes: dict[str, Outcome]

    def over_belady(self, bytes_per_token: float) -> float | None:
        """Bytes as a multiple of the bound's; None where the bound reads nothing."""
        bound = self.outcomes[BELADY].bytes_per_token
        return bytes_per_token / bound if bound else None


@dataclass(frozen=True)
class ReplayRow:
    """The figures of one policy, or of the recorded run. tpot_ms: with full overlap and without; None: not known."""

    hit_rate: float
    misses_per_token: float
    bytes_per_token: float
    over_belady: float | None
    tpot_ms: tuple[float, float] | None

    @property
    def cells(self) -> list[str]:
        """The figures for people."""
        return [
            percent(self.hit_rate),
            number(self.misses_per_token),
            megabytes(self.bytes_per_token),
            number(self.over_belady, decimals=2),
            NO_VALUE if self.tpot_ms is None else span(*self.tpot_ms, "").rstrip(),
        ]


@dataclass(frozen=True)
class Report:
    """Everything that is shown. left_out: default budgets below one token's demand, as they were written."""

    recording: Recording
    route: RecordedRoute
    budgets: tuple[Budget, ...]
    left_out: tuple[str, ...]
    timing: Timing
    recorded: Recorded
    layers: tuple[LayerUse, ...]
    fates: Fates

    @property
    def recorded_budget(self) -> Budget:
        """The budget of the recorded run."""
        return next(budget for budget in self.budgets if budget.is_recorded)

    @property
    def recall(self) -> float | None:
        """Mean recall over the layers that have guesses."""
        recalls = [layer.recall for layer in self.layers if layer.recall is not None]
        return fmean(recalls) if recalls else None

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values, for --json."""
        header, timing = self.recording.header, self.timing
        return {
            "trace": self.recording.path,
            "model": header.model,
            "header": asdict(header),
            "is_whole": self.recording.is_whole,
            "decode_steps": len(self.recording.decode_steps),
            "warm_up_steps": self.route.warm_up,
            "counted_tokens": self.route.counted_tokens,
            "broken_steps": self.recording.num_broken,
            "token_demand": sum(header.top_k),
            "smallest_pool_slots": smallest_pool(self.route),
            "timing": {
                "tpot_ms": timing.step_ms,
                "stall_ms": timing.stall_ms,
                "compute_ms": timing.compute_ms,
                "bandwidth_bytes_per_s": timing.bytes_per_s,
                "bandwidth_is_given": timing.is_bandwidth_given,
            },
            "recorded": {
                **asdict(self.recorded),
                "bytes_per_token": self.recorded.bytes_per_token,
                "over_belady": self.recorded_budget.over_belady(self.recorded.bytes_per_token),
            },
            "budgets": [self._budget_dict(budget) for budget in self.budgets],
            "left_out": list(self.left_out),
            "guesses": {"recall": self.recall, "per_layer": [asdict(one) for one in self.layers]},
            "prefetches": asdict(self.fates),
        }

    def policies(self, budget: Budget) -> dict[str, ReplayRow]:
        """The figures of every policy at one budget, by name."""
        return {
            name: ReplayRow(
                outcome.hit_rate,
                outcome.misses_per_token,
                outcome.bytes_per_token,
                budget.over_belady(outcome.bytes_per_token),
                self.timing.tpot_ms(outcome),
            )
            for name, outcome in budget.outcomes.items()
        }

    @property
    def recorded_row(self) -> ReplayRow:
        """The figures of the recorded run; its TPOT is measured."""
        did, per_token = self.recorded, self.recorded.bytes_per_token
        return ReplayRow(
            did.hits / max(did.demanded, 1),
            did.misses / did.tokens,
            per_token,
            self.recorded_budget.over_belady(per_token),
            (self.timing.step_ms, self.timing.step_ms),
        )

    def _budget_dict(self, budget: Budget) -> dict[str, Any]:
        policies = {}
        for name, row in self.policies(budget).items():
            figures = asdict(row)
            low, high = figures.pop("tpot_ms") or (None, None)
            policies[name] = {**figures, "tpot_ms_full_overlap": low, "tpot_ms_no_overlap": high}
        return {
            "num_slots": budget.num_slots,
            "pool_bytes": budget.pool_bytes,
            "share": budget.share,
            "is_recorded": budget.is_recorded,
            "policies": policies,
        }


def make_report(
    recording: Recording,
    *,
    memories: Sequence[str] = (),
    warm_up: int | None = None,
    bytes_per_s: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Replay a recording under all policies and budgets.

    Args:
        memories: budgets, as `--memory` takes them; a range of shares when empty. The recorded one is always added.
        warm_up: decode steps that are not counted; a fifth of them when left out. seed: of the random eviction.
        bytes_per_s: read speed; the recorded run's when left out.
        progress: called with (replays done, all replays).
    Raises:
        TraceError: nothing to replay, or a step demands more than the pool holds. BudgetError: a budget cannot work.
    """
    route = route_of(recording, warm_up)
    asked = [pool_of(route, memory).classes for memory in memories]
    left_out: list[str] = []
    for memory in () if memories else DEFAULT_SHARES:
        try:
            asked.append(pool_of(route, memory).classes)
        except BudgetError:
            left_out.append(memory)
    recorded = recording.header.classes
    tight = too_few(route, recorded)
    if tight is not None:
        raise TraceError(
            f"{recording.path}: a layer of a step of {max(route.rows)} rows demanded "
            f"{route.of(tight.layers).most_at_once} experts at once, more than the {tight.num_slots} slots, so that "
            "they passed through the pool, and no eviction decided. Record fewer rows, or with more memory."
        )
    pools = {tuple(one.num_slots for one in classes): classes for classes in [*asked, recorded]}
    parts = {one.layers: route.of(one.layers) for one in recorded}
    policies = replays(seed)
    budgets = []
    for done, counts in enumerate(sorted(pools, key=lambda counts: (sum(counts), counts))):
        outcomes = {}
        for at, (name, policy) in enumerate(policies.items()):
            progress(done * len(policies) + at, len(pools) * len(policies))
            # Slots of one length are a pool of their own.
            outcomes[name] = sum_of([policy(parts[one.layers], one.num_slots) for one in pools[counts]])
        budgets.append(
            Budget(
                sum(counts),
                sum(one.nbytes for one in pools[counts]),
                sum(counts) / route.num_experts,
                counts == recording.header.class_slots,
                outcomes,
            )
        )
    progress(len(pools) * len(policies), len(pools) * len(policies))
    return Report(
        recording,
        route,
        tuple(budgets),
        tuple(left_out),
        timing_of(recording, route.warm_up, bytes_per_s),
        recorded_of(recording, route.warm_up),
        tuple(layers_of(recording)),
        fates_of(recording),
    )
