"""Track which expert is in which slot: one pool over all expert keys, or several (sized.py). Slot states: states.py.

A key is *prefetched* from `prefetch` until its first demand. Prefetched keys never take more than `staging_slots`
slots, so that wrong guesses cannot evict experts known to be hot; they evict each other, oldest first. Only the decode
thread uses this module; reader threads never do.
"""

from collections.abc import Iterable, Sequence
from typing import NoReturn

from foreroute.residency.eviction import Eviction
from foreroute.residency.states import (
    AFTER_LOADED,
    AFTER_PIN,
    AFTER_RELEASE,
    CANCEL,
    EVENT_NAMES,
    EVICT,
    FAIL,
    FREE,
    FREE_LOAD,
    LOADED,
    LOADING,
    PIN,
    PINNED,
    READY,
    READY_EVICT,
    READY_PIN,
    RELEASE,
    STATE_NAMES,
    TABLE,
    IllegalEvent,
    LookupResult,
    NoVictim,
    picture_of,
)

# Callers read a key's state, so the states are exported too.
__all__ = ["FREE", "LOADING", "PINNED", "READY", "IllegalEvent", "LookupResult", "NoVictim", "Residency"]


class Residency:
    """The state of the pool: num_slots slots shared by keys 0..num_keys-1.

    Args:
        num_slots: slots in the pool. num_keys: expert keys; more than experts when layers differ in width.
        eviction: the eviction policy; reset here, owned by the pool from now on.
        staging_slots: the most slots that prefetched, not yet demanded keys may take; 0 turns prefetch off.
        deferred_slots: the most slots that `defer` may have loading at a time; 0 turns deferred loads off.
        keys_per_layer: width of a layer in keys, for `resident_per_layer`; None counts all keys as one layer.
        first_slot: number of its first slot, where these are a part of all slots.
    Attributes (read only):
        slots: their numbers. evictions: keys evicted so far, prefetched ones too.
        prefetch_used: prefetched keys that were demanded while prefetched, loaded already or not.
        prefetch_wasted: prefetched keys that were loaded, and evicted before any demand.
        prefetched_ready: the prefetched keys that are loaded, oldest first. deferred: keys that `defer` has loading.
        resident_per_layer: keys that have a slot, loaded or loading.
    Cost: benchmarks/residency.py measures it, per layer from demand to release.
    """

    def __init__(
        self,
        num_slots: int,
        num_keys: int,
        *,
        eviction: Eviction,
        staging_slots: int,
        deferred_slots: int = 0,
        keys_per_layer: int | None = None,
        first_slot: int = 0,
    ) -> None:
        assert num_slots > 0, "a pool needs a slot"
        assert 0 <= staging_slots <= num_slots, f"{staging_slots} staging slots of {num_slots}"
        self.num_slots = num_slots
        self.num_keys = num_keys
        self.staging_slots = staging_slots
        self.deferred_slots = deferred_slots
        self.evictions = self.prefetch_used = self.prefetch_wasted = 0
        self._eviction = eviction
        self.slots = range(first_slot, first_slot + num_slots)
        self._keys_per_layer = keys_per_layer or max(num_keys, 1)
        self.clear()

    def clear(self) -> None:
        """Make every slot FREE and forget all but the counts. Safe also after a call was interrupted midway."""
        self._eviction.reset(self.num_keys)
        self._state = [FREE] * self.num_keys
        self._slot_of = [-1] * self.num_keys
        self._free = list(reversed(self.slots))
        self._borrowed: set[int] = set()
        self._num_ready = 0
        self._prefetched_loading: set[int] = set()
        self.prefetched_ready: dict[int, None] = {}  # oldest first
        self.deferred: set[int] = set()
        self.resident_per_layer = [0] * -(-self.num_keys // self._keys_per_layer)

    # The decode step, in order of use.

    def demand(self, keys: Sequence[int]) -> LookupResult:
        """Pin resident keys, allocate slots for misses, and update the order of eviction (all keys, hits first).

        A miss gets a FREE slot, else that of the coldest READY key that is not prefetched, else that of the oldest
        prefetched READY key; never that of another demanded key.

        Args:
            keys: distinct, none of them PINNED.
        Raises:
            NoVictim: fewer slots are FREE or READY than misses need; nothing has been changed.
            IllegalEvent: a key is PINNED; nothing has been changed.
        """
        assert len(set(keys)) == len(keys), f"keys are demanded twice: {keys}"
        state, slot_of = self._state, self._slot_of
        hits: list[tuple[int, int]] = []
        in_flight: list[tuple[int, int]] = []
        absent: list[int] = []
        for key in keys:
            now = state[key]
            if now == READY:
                hits.append((key, slot_of[key]))
            elif now == FREE:
                absent.append(key)
            elif now == LOADING:
                in_flight.append((key, slot_of[key]))
            else:
                self._refuse(key, PIN)
        if len(absent) > len(self._free) + self._num_ready - len(hits):
            raise NoVictim(f"{len(absent)} slots are demanded of {self!r}")
        self._eviction.touch(keys)
        for key, _ in hits:
            state[key] = READY_PIN
        self._num_ready -= len(hits)
        if self._prefetched_loading or self.prefetched_ready:
            self._unmark_prefetched(hits, in_flight)
        return LookupResult(hits, in_flight, self._load(absent, self._slots_for_demand(len(absent))) if absent else [])

    def prefetch(self, keys: Sequence[int]) -> list[tuple[int, int]]:
        """Allocate slots for guessed keys that have none, and mark these as prefetched.

        While fewer than `staging_slots` are prefetched, a key gets a FREE slot, else that of the coldest READY key that
        is not prefetched; after that it evicts the oldest prefetched READY key. A guessed key is never evicted for
        another of `keys`, and one that is prefetched already becomes the youngest.

        Args:
            keys: distinct, best first.
        Returns:
            (key, slot) that the caller has to load, best first; fewer when there is no room.
        """
        state, prefetched_ready = self._state, self.prefetched_ready
        absent: list[int] = []
        kept: list[int] = []
        num_renewed = 0
        for key in keys:
            now = state[key]
            if now == FREE:
                absent.append(key)
            elif key in prefetched_ready:
                del prefetched_ready[key]
                prefetched_ready[key] = None
                num_renewed += 1
            elif now == READY:
                kept.append(key)
        if not absent:
            return []
        room = self.staging_slots - len(self._prefetched_loading) - len(prefetched_ready)
        slots = self._take(min(room, len(absent)), kept)
        for _ in range(min(len(prefetched_ready) - num_renewed, len(absent) - len(slots))):
            slots.append(self._give_up_prefetched())
        loads = self._load(absent, slots)
        self._prefetched_loading.update(absent[: len(loads)])
        return loads

    def defer(self, keys: Sequence[int]) -> list[tuple[int, int]]:
        """Allocate slots for deferred loads of keys (distinct, FREE or LOADING) that were demanded and substituted.

        All are touched. A key gets a FREE slot, else that of the coldest READY key that is not prefetched, and counts
        as demanded; so does a prefetch still LOADING, within `deferred_slots`. Returns as `prefetch`.
        """
        self._eviction.touch(keys)
        loading = [key for key in keys if key in self._prefetched_loading][: self.deferred_slots - len(self.deferred)]
        self._unmark_prefetched((), [(key, self._slot_of[key]) for key in loading])
        self.deferred.update(loading)
        absent = [key for key in keys if self._state[key] == FREE]
        loads = self._load(absent, self._take(min(self.deferred_slots - len(self.deferred), len(absent))))
        self.deferred.update(key for key, _ in loads)
        return loads

    def loaded(self, key: int) -> None:
        """Mark the key as loaded: LOADING -> READY."""
        after = AFTER_LOADED[self._state[key]]
        if after < 0:
            self._refuse(key, LOADED)
        self._state[key] = after
        self._num_ready += 1
        if key in self._prefetched_loading:
            self._prefetched_loading.remove(key)
            self.prefetched_ready[key] = None
        else:
            self.deferred.discard(key)
            self._eviction.add((key,))

    def pin(self, key: int) -> None:
        """Pin the key: READY -> PINNED. Counts as a demand when the key is prefetched."""
        after = AFTER_PIN[self._state[key]]
        if after < 0:
            self._refuse(key, PIN)
        self._state[key] = after
        self._num_ready -= 1
        if key in self.prefetched_ready:
            self._eviction.touch((key,))
            del self.prefetched_ready[key]
            self.prefetch_used += 1

    def release(self, keys: Sequence[int]) -> None:
        """Release the keys after compute: PINNED -> READY."""
        state, after_release = self._state, AFTER_RELEASE
        for key in keys:
            after = after_release[state[key]]
            if after < 0:
                self._refuse(key, RELEASE)
            state[key] = after
        self._num_ready += len(keys)
        self._eviction.add(keys)

    def cancel(self, key: int) -> None:
        """Free the slot of a key whose load was cancelled before it started: LOADING -> FREE."""
        self._drop_loading(key, CANCEL)

    def fail(self, key: int) -> None:
        """Free the slot of a key whose load failed: LOADING -> FREE."""
        self._drop_loading(key, FAIL)

    def tick(self) -> None:
        """Decay frequencies, once per step."""
        self._eviction.tick()

    def drop(self, keys: Sequence[int]) -> None:
        """Evict the keys at once, whatever their frequency: READY -> FREE."""
        for key in keys:
            self._free.append(self._evict(key))

    # Prefill's ring.

    def borrow(self, num_slots: int) -> list[int]:
        """Take up to `num_slots` out of the pool: FREE ones, then prefetched ones, then the coldest READY ones."""
        num_slots = min(num_slots, len(self._free) + self._num_ready)
        slots = self._take_free(num_slots)
        while len(slots) < num_slots and self.prefetched_ready:
            slots.append(self._give_up_prefetched())
        slots += self._give_up_coldest(num_slots - len(slots))
        self._borrowed.update(slots)
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        """Return borrowed slots to the pool, FREE."""
        for slot in slots:
            if slot not in self._borrowed:
                raise IllegalEvent(f"return of slot {slot}, which is not borrowed: {self!r}")
            self._borrowed.remove(slot)
            self._free.append(slot)

    # Questions.

    def state(self, key: int) -> int:
        """FREE when the key is absent, else LOADING, READY or PINNED."""
        return self._state[key]

    def slot_of(self, key: int) -> int:
        """The key's slot, -1 when it is absent."""
        return self._slot_of[key]

    def contains_ready(self, key: int) -> bool:
        """Whether the key is loaded: READY or PINNED."""
        return self._state[key] in (READY, PINNED)

    def ready_keys(self) -> list[int]:
        """Keys that are loaded and not pinned. Cost: O(num_keys)."""
        return [key for key, state in enumerate(self._state) if state == READY]

    @property
    def num_free(self) -> int:
        """Number of FREE slots."""
        return len(self._free)

    @property
    def num_resident(self) -> int:
        """Number of keys that have a slot, loaded or loading."""
        return self.num_slots - len(self._free) - len(self._borrowed)

    @property
    def num_prefetched(self) -> int:
        """Number of prefetched keys not demanded yet, LOADING or READY."""
        return len(self._prefetched_loading) + len(self.prefetched_ready)

    def __repr__(self) -> str:
        prefetched = self._prefetched_loading.union(self.prefetched_ready)
        picture = picture_of(self.slots, self._borrowed, self._slot_of, self._state, prefetched)
        return f"Residency({picture}; {self.num_prefetched}/{self.staging_slots} prefetched)"

    # Slot transitions.

    def _refuse(self, key: int, event: int) -> NoReturn:
        raise IllegalEvent(f"{EVENT_NAMES[event]} of key {key}, which is {STATE_NAMES[self._state[key]]}: {self!r}")

    def _load(self, keys: Iterable[int], slots: Iterable[int]) -> list[tuple[int, int]]:
        """Assign `slots` (FREE) to the first of `keys` (absent) as LOADING; return the (key, slot) pairs."""
        state, slot_of, loading = self._state, self._slot_of, FREE_LOAD
        per_layer, keys_per_layer = self.resident_per_layer, self._keys_per_layer
        # Fewer slots than keys: a prefetch without room.
        pairs = list(zip(keys, slots))  # noqa: B905
        for key, slot in pairs:
            state[key] = loading
            slot_of[key] = slot
            per_layer[key // keys_per_layer] += 1
        return pairs

    def _drop_loading(self, key: int, event: int) -> None:
        after = TABLE[self._state[key]][event]
        if after < 0:
            self._refuse(key, event)
        self._prefetched_loading.discard(key)
        self.deferred.discard(key)
        self._free.append(self._vacate(key, after))

    def _vacate(self, key: int, after: int) -> int:
        """Remove the key from its slot; return the slot, which is not in the free list yet."""
        slot = self._slot_of[key]
        self._state[key] = after
        self._slot_of[key] = -1
        self.resident_per_layer[key // self._keys_per_layer] -= 1
        return slot

    def _take_free(self, num_slots: int) -> list[int]:
        free = self._free
        return [free.pop() for _ in range(min(num_slots, len(free)))]

    def _take(self, num_slots: int, kept: Sequence[int] = ()) -> list[int]:
        """Take up to `num_slots` slots: FREE ones, then those of the coldest keys."""
        slots = self._take_free(num_slots) if self._free else []
        return slots + self._give_up_coldest(num_slots - len(slots), kept)

    def _slots_for_demand(self, num_slots: int) -> list[int]:
        slots = self._take(num_slots)
        while len(slots) < num_slots:
            slots.append(self._give_up_prefetched())
        return slots

    def _give_up_coldest(self, num_slots: int, kept: Sequence[int] = ()) -> list[int]:
        """Evict up to `num_slots` of the coldest READY keys, neither prefetched nor in `kept`; return their slots.

        PINNED candidates leave the eviction order here, and enter it again at their release. So do keys that were
        dropped and then loaded or prefetched anew; they enter it again once loaded or demanded.
        """
        state, slot_of, prefetched_ready, pop = self._state, self._slot_of, self.prefetched_ready, self._eviction.pop
        per_layer, keys_per_layer = self.resident_per_layer, self._keys_per_layer
        slots: list[int] = []
        passed_over: list[int] = []
        while len(slots) < num_slots and (key := pop()) >= 0:
            if state[key] != READY or key in prefetched_ready:
                continue
            if key in kept:
                passed_over.append(key)
                continue
            # As _evict does, inlined: this is the hot part of a miss.
            state[key] = READY_EVICT
            slots.append(slot_of[key])
            slot_of[key] = -1
            per_layer[key // keys_per_layer] -= 1
        self._num_ready -= len(slots)
        self.evictions += len(slots)
        if passed_over:
            self._eviction.add(passed_over)
        return slots

    def _evict(self, key: int) -> int:
        """Evict one READY key, prefetched or not; return its slot."""
        after = TABLE[self._state[key]][EVICT]
        if after < 0:
            self._refuse(key, EVICT)
        if key in self.prefetched_ready:
            del self.prefetched_ready[key]
            self.prefetch_wasted += 1
        self._num_ready -= 1
        self.evictions += 1
        return self._vacate(key, after)

    def _give_up_prefetched(self) -> int:
        """Evict the oldest prefetched READY key; return its slot. One must exist."""
        return self._evict(next(iter(self.prefetched_ready)))

    def _unmark_prefetched(self, ready: Sequence[tuple[int, int]], loading: Sequence[tuple[int, int]]) -> None:
        """Count the prefetched ones of these demanded keys as used, and unmark them."""
        prefetched_ready, prefetched_loading = self.prefetched_ready, self._prefetched_loading
        num_prefetched = len(prefetched_ready) + len(prefetched_loading)
        for key, _ in ready:
            if key in prefetched_ready:
                del prefetched_ready[key]
        for key, _ in loading:
            prefetched_loading.discard(key)
        self.prefetch_used += num_prefetched - len(prefetched_ready) - len(prefetched_loading)
