"""The experts that decoding demanded, without hits and misses: the input of every replay."""

from dataclasses import dataclass

from foreroute.errors import BudgetError, TraceError
from foreroute.memory.budget import SlotPlan, plan_slots
from foreroute.report.events import Recording
from foreroute.units import format_memory, parse_memory

# Default share of the decode steps that warm up the pool and are not counted.
_WARM_UP_SHARE = 0.2


@dataclass(frozen=True)
class Route:
    """The experts demanded by each decode step, layer by layer, as keys: layer * keys_per_layer + expert.

    Prefill is not in it: its experts stream through the pool (docs/structure.md), whatever the eviction.

    steps: [step][layer] -> distinct keys, ascending; empty for a layer that demanded none.
    rows: tokens of each step. warm_up: number of first steps that fill the pool and are not counted.
    """

    experts_per_layer: tuple[int, ...]
    top_k: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    slot_bytes: int
    steps: tuple[tuple[tuple[int, ...], ...], ...]
    rows: tuple[int, ...]
    warm_up: int

    @property
    def keys_per_layer(self) -> int:
        """Number of experts of the widest layer."""
        return max(self.experts_per_layer)

    @property
    def num_keys(self) -> int:
        """Number of keys, including those that narrower layers leave unused."""
        return self.keys_per_layer * len(self.experts_per_layer)

    @property
    def num_experts(self) -> int:
        """Number of experts over all layers."""
        return sum(self.experts_per_layer)

    @property
    def counted_tokens(self) -> int:
        """Tokens of the counted steps."""
        return sum(self.rows[self.warm_up :])

    @property
    def most_at_once(self) -> int:
        """The most experts that one layer of one step demanded."""
        return max(len(keys) for step in self.steps for keys in step)


def route_of(recording: Recording, warm_up: int | None = None) -> Route:
    """Extract the decode steps of a recording.

    Args:
        warm_up: steps that are not counted; a fifth of them when left out.
    Raises:
        TraceError: there are no decode steps, or the warm-up takes all of them.
    """
    header, steps = recording.header, recording.decode_steps
    if not steps:
        raise TraceError(
            f"{recording.path} has no whole decode step: nothing to replay. Record some generated tokens "
            "(--max-new-tokens 200)."
        )
    warm_up = int(len(steps) * _WARM_UP_SHARE) if warm_up is None else warm_up
    if warm_up >= len(steps):
        raise TraceError(
            f"{recording.path} has {len(steps)} decode steps; a warm-up of {warm_up} leaves none to count. "
            "Lower --warm-up."
        )
    widest = max(header.experts_per_layer)
    return Route(
        header.experts_per_layer,
        header.top_k,
        header.expert_bytes,
        header.slot_bytes,
        tuple(
            tuple(tuple(sorted(done.layer * widest + expert for expert in done.demanded)) for done in step.layers)
            for step in steps
        ),
        tuple(step.rows for step in steps),
        warm_up,
    )


def pool_of(route: Route, memory: str | int) -> SlotPlan:
    """Compute the pool that a budget (`memory`) buys for `route`, as the engine does.

    Raises:
        BudgetError: it cannot be parsed, or holds less than one token's demand or than one layer of a step.
    """
    budget = parse_memory(memory, route.num_experts * route.slot_bytes)
    slots = plan_slots(budget, route.slot_bytes, route.num_experts, route.top_k)
    if slots.num_slots < route.most_at_once:
        enough = format_memory(route.most_at_once * route.slot_bytes, round_up=True)
        raise BudgetError(
            f"{memory} holds {slots.num_slots} slots; one layer of a step of {max(route.rows)} rows needs "
            f"{route.most_at_once}. Raise --memory to {enough}."
        )
    return slots


def smallest_pool(route: Route) -> int:
    """Fewest slots that hold one token's demand, and any layer of any step."""
    return max(sum(route.top_k), route.most_at_once)
