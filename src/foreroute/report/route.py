"""The experts that decoding demanded, without hits and misses: the input of every replay."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from foreroute.errors import BudgetError, TraceError
from foreroute.memory.budget import SlotPlan, plan_pool
from foreroute.report.events import Recording
from foreroute.types import SlotClass
from foreroute.units import format_memory, parse_memory

# Default share of the decode steps that warm up the pool and are not counted.
_WARM_UP_SHARE = 0.2


@dataclass(frozen=True)
class RecordedRoute:
    """The experts demanded by each decode step, layer by layer, as keys: layer * keys_per_layer + expert.

    Prefill is not in it: its experts stream through the pool (docs/structure.md), whatever the eviction.

    steps: [step][layer] -> distinct keys, ascending; empty for a layer that demanded none.
    rows: tokens of each step. warm_up: number of first steps that fill the pool and are not counted.
    slot_bytes: of the longest slot. slot_lengths: of each layer's slots; empty where all are of slot_bytes.
    layers: those whose demands are in the steps; empty for all.
    """

    experts_per_layer: tuple[int, ...]
    top_k: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    slot_bytes: int
    steps: tuple[tuple[tuple[int, ...], ...], ...]
    rows: tuple[int, ...]
    warm_up: int
    slot_lengths: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()

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
        """Number of experts over all of its layers."""
        return sum(self.experts_per_layer[layer] for layer in self.layers or range(len(self.experts_per_layer)))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Bytes of a slot, by layer."""
        return self.slot_lengths or (self.slot_bytes,) * len(self.experts_per_layer)

    @property
    def whole_bytes(self) -> int:
        """Bytes of slots that hold every expert."""
        return sum(count * length for count, length in zip(self.experts_per_layer, self.lengths, strict=True))

    def of(self, layers: Sequence[int]) -> "RecordedRoute":
        """The demands of these layers alone: slots of their length are a pool of their own."""
        if len(layers) == len(self.experts_per_layer):
            return self
        steps = tuple(tuple(keys if at in layers else () for at, keys in enumerate(step)) for step in self.steps)
        return replace(self, steps=steps, layers=tuple(layers))

    @property
    def counted_tokens(self) -> int:
        """Tokens of the counted steps."""
        return sum(self.rows[self.warm_up :])

    @property
    def most_at_once(self) -> int:
        """The most experts that one layer of one step demanded."""
        return max(len(keys) for step in self.steps for keys in step)


def route_of(recording: Recording, warm_up: int | None = None) -> RecordedRoute:
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
    return RecordedRoute(
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
        header.layer_slot_bytes,
    )


def pool_of(route: RecordedRoute, memory: str | int) -> SlotPlan:
    """Compute the pool that a budget (`memory`) buys for `route`, as the engine does.

    Raises:
        BudgetError: it cannot be parsed, or holds less than one token's demand or than one layer of a step.
    """
    slots = plan_pool(parse_memory(memory, route.whole_bytes), route.lengths, route.experts_per_layer, route.top_k)
    tight = too_few(route, slots.classes)
    if tight is not None:
        needed = route.of(tight.layers).most_at_once
        # Of more memory, slots of other lengths get their share too.
        held = sum(route.experts_per_layer[layer] for layer in tight.layers)
        enough = format_memory(-(-route.whole_bytes * needed // held), round_up=True)
        raise BudgetError(
            f"{memory} holds {tight.num_slots} slots; one layer of a step of {max(route.rows)} rows needs "
            f"{needed}. Raise --memory to {enough}."
        )
    return slots


def too_few(route: RecordedRoute, classes: Sequence[SlotClass]) -> SlotClass | None:
    """The slots that a layer of one of the steps needs more of; None where there are enough."""
    return next((one for one in classes if one.num_slots < route.of(one.layers).most_at_once), None)


def smallest_pool(route: RecordedRoute) -> int:
    """Fewest slots that hold one token's demand, and any layer of any step."""
    lengths = route.lengths
    layers_of = [[layer for layer, own in enumerate(lengths) if own == length] for length in dict.fromkeys(lengths)]
    return sum(max(sum(route.top_k[at] for at in layers), route.of(layers).most_at_once) for layers in layers_of)
