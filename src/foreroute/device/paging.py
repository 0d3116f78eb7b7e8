"""State and operations of a device that pages experts for itself: the reference, in plain Python.

This is residency/'s pool with LRU, kept in tensors, so that a decode step never waits for the host. The functions here
run on the CPU; device/triton_paging.py has the same ones for a GPU, with the same signatures, and tests compare both
with residency/.

Differences from residency/: the device gets no completions. A slot assigned by `plan_prefetch` is in flight until an
operation gets `arrived=True`: all copies of earlier lists are done. The copies of `plan` have to be done before the
experts are computed, and its keys are pinned until `release` or the next `plan`. A staged key's age counts from its
last guess, not its arrival. Free slots are used lowest first, and a demand's keys are served in ascending order.

Ordering for callers: planners change the tables and therefore run in one stream, one after the other; `fetch` reads
only its own list and the arena, and may overlap with everything that does not read the slots it writes.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

COUNTERS = (
    "hits", "late_hits", "misses", "prefetched", "prefetch_used", "prefetch_wasted", "evictions", "shortages",
)  # fmt: skip
HITS, LATE_HITS, MISSES, PREFETCHED, USED, WASTED, EVICTIONS, SHORTAGES = range(len(COUNTERS))
CLOCK, SEQUENCE, PINNED = range(3)
LOADED, IN_FLIGHT = range(2)


@dataclass(frozen=True)
class PagingState:
    """Which expert is in which slot, on the device. All tensors are changed in place.

    slot_of_key: int32 [num_keys], -1 where the key is absent. key_of_slot: int32 [num_slots], -1 where free.
    stamp: int64 [num_slots], the clock at the last demand. staged_at: int64 [num_slots], 0 where not staged, else the
        sequence number of the last guess. in_flight: int32 [num_slots], LOADED, or IN_FLIGHT while a copy may run.
    marks: int64 [3]: CLOCK, SEQUENCE (of guesses), PINNED (slots with this stamp are pinned).
    counters: int64, in the order of COUNTERS. A shortage is a demanded key that got no slot: the step is invalid.
    num_experts: keys of a layer. staging_slots: as in residency/.
    """

    slot_of_key: torch.Tensor
    key_of_slot: torch.Tensor
    stamp: torch.Tensor
    staged_at: torch.Tensor
    in_flight: torch.Tensor
    marks: torch.Tensor
    counters: torch.Tensor
    num_experts: int
    staging_slots: int

    @classmethod
    def create(
        cls,
        num_slots: int,
        num_keys: int,
        num_experts: int,
        *,
        staging_slots: int,
        device: torch.device | str = "cpu",
    ) -> "PagingState":
        """Make an empty pool on `device`: num_slots slots, num_keys keys, num_experts of them per layer.

        With n + staging_slots slots, a demand of n keys always fits.
        """
        assert num_slots > 0, "a pool needs a slot"
        assert 0 <= staging_slots <= num_slots, f"{staging_slots} staging slots of {num_slots}"
        assert num_keys % num_experts == 0, f"{num_keys} keys are not a multiple of {num_experts}"

        def zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        state = cls(
            zeros(num_keys, torch.int32), zeros(num_slots, torch.int32), zeros(num_slots, torch.int64),
            zeros(num_slots, torch.int64), zeros(num_slots, torch.int32), zeros(3, torch.int64),
            zeros(len(COUNTERS), torch.int64), num_experts, staging_slots,
        )  # fmt: skip
        state.clear()
        return state

    @property
    def num_slots(self) -> int:
        """Number of slots in the pool."""
        return len(self.key_of_slot)

    def clear(self) -> None:
        """Free every slot and reset all state and counters. Does not wait for the device."""
        self.slot_of_key.fill_(-1)
        self.key_of_slot.fill_(-1)
        for tensor in (self.stamp, self.staged_at, self.in_flight, self.marks, self.counters):
            tensor.zero_()
        release(self)

    def counts(self) -> dict[str, int]:
        """Return the counters by name. Waits for the device: never call it within a step."""
        return dict(zip(COUNTERS, self.counters.tolist(), strict=True))


@dataclass(frozen=True)
class CopyList:
    """Records to copy: the first `count` of `keys`, each into the slot at the same index. The rest is undefined.

    keys, slots: int32 [capacity]. count: int32 [1].
    """

    keys: torch.Tensor
    slots: torch.Tensor
    count: torch.Tensor

    @classmethod
    def create(cls, capacity: int, device: torch.device | str = "cpu") -> "CopyList":
        """Make an empty list on `device`; `capacity` is the most keys of one call."""
        keys, slots = torch.zeros(2, max(capacity, 1), dtype=torch.int32, device=device)
        return cls(keys, slots, torch.zeros(1, dtype=torch.int32, device=device))

    def pairs(self) -> list[tuple[int, int]]:
        """Return the (key, slot) pairs. Waits for the device."""
        count = int(self.count)
        return list(zip(self.keys[:count].tolist(), self.slots[:count].tolist(), strict=True))


def plan(
    state: PagingState, layer: int, ids: torch.Tensor, slots: torch.Tensor, copies: CopyList, *, arrived: bool
) -> None:
    """Pin and find a slot for every expert that a layer's step uses, as `Residency.demand`; releases the last plan's.

    Args:
        state: changed in place. ids: int [tokens, k] experts of the layer; those < 0 or >= num_experts are ignored.
        slots: out, int32 [tokens, k]: the experts' slots, -1 for ignored ids.
        copies: out: records to copy before use; capacity >= the number of distinct experts.
        arrived: the copies of all earlier lists are done.
    """
    pool = _Pool(state, arrived)
    now = pool.tick(CLOCK)
    base = layer * state.num_experts
    keys = _distinct_keys(ids, base, state.num_experts)
    hits = [key for key in keys if pool.slot_of[key] >= 0]
    absent = [key for key in keys if pool.slot_of[key] < 0]
    for key in hits:
        slot = pool.slot_of[key]
        is_late_hit = pool.in_flight[slot] != LOADED
        pool.count(LATE_HITS if is_late_hit else HITS)
        pool.count(USED, pool.staged_at[slot] > 0)
        pool.touch(slot, now)
    state.marks[PINNED] = now
    pairs = pool.place(absent, pool.victims(len(absent), len(absent)))
    for _, slot in pairs:
        pool.touch(slot, now)
    pool.count(MISSES, len(absent))
    pool.count(SHORTAGES, len(absent) - len(pairs))
    pool.store()
    _write(copies, pairs)
    found = [pool.slot_of[base + id] if 0 <= id < state.num_experts else -1 for id in ids.flatten().tolist()]
    slots.copy_(torch.tensor(found, dtype=torch.int32).view(ids.shape))


def plan_prefetch(state: PagingState, layer: int, guesses: torch.Tensor, copies: CopyList, *, arrived: bool) -> None:
    """Find slots for guessed experts that have none, and stage them, as `Residency.prefetch`.

    Evicts no key that is pinned, in flight or guessed here; staged keys stay within `staging_slots`.

    Args:
        state: changed in place. guesses: int [n] experts of the layer, best first; duplicates and ids < 0 or
            >= num_experts are ignored. copies: out: records to copy, best first. arrived: as for `plan`.
    """
    pool = _Pool(state, arrived)
    base = layer * state.num_experts
    guessed = list(dict.fromkeys(base + id for id in guesses.flatten().tolist() if 0 <= id < state.num_experts))
    absent = [key for key in guessed if pool.slot_of[key] < 0]
    kept = {pool.slot_of[key] for key in guessed if pool.slot_of[key] >= 0}
    num_staged = sum(at > 0 for at in pool.staged_at)
    for key in guessed:
        slot = pool.slot_of[key]
        if slot >= 0 and pool.staged_at[slot] > 0 and pool.in_flight[slot] == LOADED:
            pool.staged_at[slot] = pool.tick(SEQUENCE)
    room = max(min(state.staging_slots - num_staged, len(absent)), 0)
    victims = pool.victims(room, 0, kept)
    victims += pool.victims(0, len(absent) - len(victims), kept)
    pairs = pool.place(absent, victims)
    for _, slot in pairs:
        pool.staged_at[slot] = pool.tick(SEQUENCE)
        pool.in_flight[slot] = IN_FLIGHT
    pool.count(PREFETCHED, len(pairs))
    pool.store()
    _write(copies, pairs)


def release(state: PagingState) -> None:
    """Release the experts of the last plan. Can be captured in a graph."""
    state.marks[PINNED:].fill_(-1)


def fetch(
    arena_address: int,
    record_offsets: torch.Tensor,
    copies: CopyList,
    slots: torch.Tensor,
    *,
    record_bytes: int,
    num_programs: int = 16,
) -> None:
    """Copy the records listed in `copies` from the host's arena into their slots.

    Args:
        arena_address: the arena's address as seen by the device; 16-byte aligned.
        record_offsets: int64 [num_keys], start of a key's record in the arena, in bytes; a multiple of 16.
        slots: uint8 [num_slots, slot_bytes]; slot_bytes a multiple of 16.
        record_bytes: bytes of a record, a multiple of 16, at most slot_bytes.
        num_programs: programs that share the work, each on its own SM; unused here.
    """
    for key, slot in copies.pairs():
        source = arena_address + int(record_offsets[key])
        ctypes.memmove(slots[slot].data_ptr(), source, record_bytes)


class _Pool:
    """The state as lists, for one operation: `victims` frees slots, `place` assigns them."""

    def __init__(self, state: PagingState, arrived: bool) -> None:
        self._state = state
        self.slot_of: list[int] = state.slot_of_key.tolist()
        self.key_of: list[int] = state.key_of_slot.tolist()
        self.stamp: list[int] = state.stamp.tolist()
        self.staged_at: list[int] = state.staged_at.tolist()
        self.in_flight: list[int] = [LOADED] * state.num_slots if arrived else state.in_flight.tolist()

    def tick(self, mark: int) -> int:
        self._state.marks[mark] += 1
        return int(self._state.marks[mark])

    def count(self, counter: int, by: int = 1) -> None:
        self._state.counters[counter] += int(by)

    def touch(self, slot: int, now: int) -> None:
        """Mark the slot as demanded now, and no longer staged."""
        self.stamp[slot] = now
        self.staged_at[slot] = 0

    def victims(self, num_cold: int, num_staged: int, kept: set[int] | frozenset[int] = frozenset()) -> list[int]:
        """Take up to `num_cold` free or else coldest slots, then the oldest staged ones up to `num_staged` in all."""
        pinned = int(self._state.marks[PINNED])
        found: list[int] = []
        idle = [
            slot
            for slot, key in enumerate(self.key_of)
            if key >= 0 and slot not in kept and self.in_flight[slot] == LOADED
        ]
        cold = [slot for slot in idle if not self.staged_at[slot] and self.stamp[slot] != pinned]
        cold.sort(key=lambda slot: (self.stamp[slot], self.key_of[slot]))
        free = [slot for slot, key in enumerate(self.key_of) if key == -1]
        found = (free + cold)[:num_cold]
        staged = sorted((slot for slot in idle if self.staged_at[slot]), key=self.staged_at.__getitem__)
        found += staged[: max(num_staged - len(found), 0)]
        for slot in found:
            self._give_up(slot)
        return found

    def _give_up(self, slot: int) -> None:
        key = self.key_of[slot]
        if key >= 0:
            self.slot_of[key] = -1
            self.count(EVICTIONS)
            self.count(WASTED, self.staged_at[slot] > 0)
        self.key_of[slot] = -2  # neither free nor in use, until it is placed
        self.staged_at[slot] = 0

    def place(self, keys: Sequence[int], slots: Sequence[int]) -> list[tuple[int, int]]:
        """Assign all slots to the first of the keys; return the (key, slot) pairs."""
        pairs = list(zip(keys, slots))  # noqa: B905 - there may be fewer slots
        assert len(pairs) == len(slots)
        for key, slot in pairs:
            self.slot_of[key] = slot
            self.key_of[slot] = key
        return pairs

    def store(self) -> None:
        state = self._state
        state.slot_of_key.copy_(torch.tensor(self.slot_of))
        state.key_of_slot.copy_(torch.tensor(self.key_of))
        state.stamp.copy_(torch.tensor(self.stamp))
        state.staged_at.copy_(torch.tensor(self.staged_at))
        state.in_flight.copy_(torch.tensor(self.in_flight))


def _distinct_keys(ids: torch.Tensor, base: int, num_experts: int) -> list[int]:
    return sorted({base + id for id in ids.flatten().tolist() if 0 <= id < num_experts})


def _write(copies: CopyList, pairs: Sequence[tuple[int, int]]) -> None:
    copies.count.fill_(len(pairs))
    for at, (key, slot) in enumerate(pairs):
        copies.keys[at] = key
        copies.slots[at] = slot
