"""Slots of several lengths: a `Residency` for each length, over the layers whose experts its slots hold.

An expert is only ever in a slot of its layer's length, so that slots of one length are a pool of their own: their
experts evict each other, and each length keeps the share of the memory that it was given.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from foreroute.residency.eviction import Eviction
from foreroute.residency.slots import Residency
from foreroute.types import SlotClass


def _total(name: str) -> Any:
    """A property: the sum of this count of `Residency` over the slots of every length."""
    return property(lambda self: sum(getattr(part, name) for part in self.parts))


class SizedResidency:
    """Several `Residency`s that are asked together, by key. What concerns one layer is asked of `by_layer`.

    Args:
        parts: one per slot length; their slots have numbers of their own, their keys are all the model's.
        part_of_layer: by MoE layer, the position in `parts`. keys_per_layer: width of a layer in keys.
    Attributes (read only):
        by_layer: each MoE layer's part.
    """

    def __init__(self, parts: Sequence[Residency], part_of_layer: Sequence[int], keys_per_layer: int) -> None:
        self.parts = tuple(parts)
        self.by_layer = [self.parts[part] for part in part_of_layer]
        self._by_key = [part for part in self.by_layer for _ in range(keys_per_layer)]

    def clear(self) -> None:
        """See `Residency`; so are the other methods."""
        for part in self.parts:
            part.clear()

    def tick(self) -> None:
        """Decay frequencies, once per step."""
        for part in self.parts:
            part.tick()

    # Events of one key.

    def loaded(self, key: int) -> None:
        """Mark the key as loaded: LOADING -> READY."""
        self._by_key[key].loaded(key)

    def pin(self, key: int) -> None:
        """Pin the key: READY -> PINNED."""
        self._by_key[key].pin(key)

    def cancel(self, key: int) -> None:
        """Free the slot of a key whose load was cancelled before it started: LOADING -> FREE."""
        self._by_key[key].cancel(key)

    def fail(self, key: int) -> None:
        """Free the slot of a key whose load failed: LOADING -> FREE."""
        self._by_key[key].fail(key)

    # Of several keys.

    def release(self, keys: Sequence[int]) -> None:
        """Release the keys after compute: PINNED -> READY."""
        for part, own in self._parted(keys):
            part.release(own)

    def drop(self, keys: Sequence[int]) -> None:
        """Evict the keys at once, whatever their frequency: READY -> FREE."""
        for part, own in self._parted(keys):
            part.drop(own)

    def defer(self, keys: Sequence[int]) -> list[tuple[int, int]]:
        """Allocate slots for deferred loads."""
        return [load for part, own in self._parted(keys) for load in part.defer(own)]

    def give_back(self, slots: Sequence[int]) -> None:
        """Return borrowed slots to the pool, FREE."""
        for part in self.parts:
            own = [slot for slot in slots if slot in part.slots]
            if own:
                part.give_back(own)

    # Questions.

    def state(self, key: int) -> int:
        """FREE when the key is absent, else LOADING, READY or PINNED."""
        return self._by_key[key].state(key)

    def slot_of(self, key: int) -> int:
        """The key's slot, -1 when it is absent."""
        return self._by_key[key].slot_of(key)

    def contains_ready(self, key: int) -> bool:
        """Whether the key is loaded: READY or PINNED."""
        return self._by_key[key].contains_ready(key)

    def ready_keys(self) -> list[int]:
        """Keys that are loaded and not pinned."""
        return sorted(key for part in self.parts for key in part.ready_keys())

    @property
    def num_keys(self) -> int:
        """Expert keys."""
        return self.parts[0].num_keys

    # Of the slots of all lengths together.
    num_slots = _total("num_slots")
    staging_slots = _total("staging_slots")
    num_free = _total("num_free")
    num_resident = _total("num_resident")
    num_prefetched = _total("num_prefetched")
    evictions = _total("evictions")
    prefetch_used = _total("prefetch_used")
    prefetch_wasted = _total("prefetch_wasted")

    @property
    def prefetched_ready(self) -> Iterable[int]:
        """The prefetched keys that are loaded, by part."""
        # `list` copies a dict's keys atomically: another thread may ask.
        return [key for part in self.parts for key in list(part.prefetched_ready)]

    @property
    def deferred(self) -> set[int]:
        """Keys that `defer` has loading."""
        return {key for part in self.parts for key in part.deferred}

    def __repr__(self) -> str:
        return f"SizedResidency({'; '.join(map(repr, self.parts))})"

    def _parted(self, keys: Sequence[int]) -> Iterator[tuple[Residency, list[int]]]:
        """The keys by their part, in their order."""
        for part in self.parts:
            own = [key for key in keys if self._by_key[key] is part]
            if own:
                yield part, own


def residency_of(
    classes: Sequence[SlotClass],
    num_keys: int,
    keys_per_layer: int,
    eviction: Callable[[], Eviction],
    *,
    prefetches: bool,
    deferred_slots: Sequence[int],
) -> Residency | SizedResidency:
    """Make the pool of these slots: one `Residency` where they have one length.

    Args:
        eviction: makes one. prefetches: False leaves no slots to prefetches.
        deferred_slots: by class, the most slots of deferred loads.
    """
    parts = [
        Residency(
            one.num_slots,
            num_keys,
            eviction=eviction(),
            staging_slots=one.staging_slots if prefetches else 0,
            deferred_slots=deferred,
            keys_per_layer=keys_per_layer,
            first_slot=one.first,
        )
        for one, deferred in zip(classes, deferred_slots, strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    part_of = {layer: at for at, one in enumerate(classes) for layer in one.layers}
    return SizedResidency(parts, [part_of[layer] for layer in range(len(part_of))], keys_per_layer)


def by_layer(residency: Residency | SizedResidency, num_layers: int) -> list[Residency]:
    """The pool that each of the MoE layers' experts are in."""
    return residency.by_layer if isinstance(residency, SizedResidency) else [residency] * num_layers


def parts_of(residency: Residency | SizedResidency) -> tuple[Residency, ...]:
    """The pool of each slot length."""
    return residency.parts if isinstance(residency, SizedResidency) else (residency,)
