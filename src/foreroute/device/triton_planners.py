"""Triton kernels that assign slots to experts; triton_paging.py launches them.

Every planner is one program: one block makes all sequential decisions, and no other program touches the tables.

It has no races within: it works on the values it loaded and on scalars that all its threads have; its stores are read
again in one place only, the order of the slots, behind a barrier (`debug_barrier` is __syncthreads, which orders a
block's global accesses too). A slot is assigned once, because it is removed from `order` when taken; scattered stores
go to distinct slots, because distinct keys have distinct slots.

Bound by launch and latency, some microseconds. Each eviction is one reduction over all slots, about 1 us, where the
copy that follows takes 20 to 200.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton decides which parameters are tensors and which numbers.

import triton
import triton.language as tl

# Ranges of the eviction order: free slots, then cold ones by stamp and key, then staged ones by age.
_FREE = tl.constexpr(-(2**62))
_STAGED = tl.constexpr(2**61)
_NEVER = tl.constexpr(2**63 - 1)
# Bits of a key in the order of cold slots.
_KEY_BITS = tl.constexpr(24)

# Indices in paging.COUNTERS and marks, and values of in_flight; tests/kernels checks that they agree.
_HITS, _LATE_HITS, _MISSES, _PREFETCHED = (tl.constexpr(at) for at in range(4))
_USED, _WASTED, _EVICTIONS, _SHORTAGES = (tl.constexpr(at) for at in range(4, 8))
_CLOCK, _SEQUENCE, _PINNED = (tl.constexpr(at) for at in range(3))
_LOADED, _IN_FLIGHT = (tl.constexpr(at) for at in range(2))


@triton.jit
def _count(counters, counter, by):
    """Add `by` to a counter."""
    tl.store(counters + counter, tl.load(counters + counter) + by)


@triton.jit
def _is_wanted(ids, num_ids, num_experts, experts, CHUNK: tl.constexpr):
    """Return a mask of `experts` that are among the ids; ids out of range are ignored."""
    wanted = tl.zeros_like(experts)
    for start in range(0, num_ids, CHUNK):
        at = start + tl.arange(0, CHUNK)
        id = tl.load(ids + at, at < num_ids, -1).to(tl.int32)
        wanted = tl.maximum(wanted, tl.max((id[:, None] == experts[None, :]).to(tl.int32), 0))
    return (wanted > 0) & (experts < num_experts)


@triton.jit
def _order_of(key_of_slot, stamp, staged_at, in_flight, slot, num_slots, pinned, ARRIVED: tl.constexpr):
    """Return each slot's eviction order: the lowest first, _NEVER for slots in use."""
    is_slot = slot < num_slots
    key = tl.load(key_of_slot + slot, is_slot, 0).to(tl.int64)
    stamped = tl.load(stamp + slot, is_slot, 0)
    staged = tl.load(staged_at + slot, is_slot, 0)
    order = tl.where(staged > 0, _STAGED + staged, (stamped << _KEY_BITS) | key)
    order = tl.where((staged == 0) & (stamped == pinned), _NEVER, order)
    if not ARRIVED:
        order = tl.where(tl.load(in_flight + slot, is_slot, 0) != _LOADED, _NEVER, order)
    order = tl.where(key < 0, _FREE + slot.to(tl.int64), order)
    return tl.where(is_slot, order, _NEVER)


@triton.jit
def _vacate(slot_of_key, key_of_slot, victim):
    """Remove the victim's key, if it holds one, from `slot_of_key`. The caller overwrites `key_of_slot`."""
    key = tl.load(key_of_slot + victim)
    tl.store(slot_of_key + key, -1, key >= 0)


@triton.jit
def plan_kernel(
    ids, num_ids, base, num_experts, num_slots,
    slot_of_key, key_of_slot, stamp, staged_at, in_flight, marks, counters,
    slots_out, copy_keys, copy_slots, copy_count,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, ARRIVED: tl.constexpr,
):  # fmt: skip
    """See `paging.plan`."""
    expert = tl.arange(0, EXPERTS)
    slot = tl.arange(0, SLOTS)
    now = tl.load(marks + _CLOCK) + 1
    wanted = _is_wanted(ids, num_ids, num_experts, expert, CHUNK)
    place = tl.load(slot_of_key + base + expert, wanted, -1)
    hit = wanted & (place >= 0)
    miss = wanted & (place < 0)
    if ARRIVED:
        late = hit & (place < 0)
        tl.store(in_flight + slot, tl.zeros_like(slot), slot < num_slots)
    else:
        late = hit & (tl.load(in_flight + place, hit, 0) != _LOADED)
    used = hit & (tl.load(staged_at + place, hit, 0) > 0)
    # All threads read the old staging before any of them changes it.
    tl.debug_barrier()
    # Hits are touched before misses are inserted.
    tl.store(stamp + place, tl.zeros_like(place).to(tl.int64) + now, hit)
    tl.store(staged_at + place, tl.zeros_like(place).to(tl.int64), hit)
    tl.debug_barrier()
    order = _order_of(key_of_slot, stamp, staged_at, in_flight, slot, num_slots, now, ARRIVED)
    num_misses = tl.sum(miss.to(tl.int32), 0)
    rank = tl.cumsum(miss.to(tl.int32), 0) - 1
    num_placed, num_evicted, num_wasted = 0, 0, 0
    for nth in range(num_misses):
        lowest = tl.min(order, 0)
        if lowest != _NEVER:
            victim = tl.min(tl.where(order == lowest, slot, SLOTS), 0)
            order = tl.where(slot == victim, _NEVER, order)
            _vacate(slot_of_key, key_of_slot, victim)
            num_evicted += (lowest >= 0).to(tl.int32)
            num_wasted += (lowest >= _STAGED).to(tl.int32)
            place = tl.where(miss & (rank == nth), victim, place)
            num_placed += 1
    placed = miss & (place >= 0)
    # The scalar loads of `_vacate` come before the stores that overwrite the same values.
    tl.debug_barrier()
    tl.store(slot_of_key + base + expert, place, placed)
    tl.store(key_of_slot + place, base + expert, placed)
    tl.store(stamp + place, tl.zeros_like(place).to(tl.int64) + now, placed)
    tl.store(staged_at + place, tl.zeros_like(place).to(tl.int64), placed)
    tl.store(copy_keys + rank, base + expert, placed)
    tl.store(copy_slots + rank, place, placed)
    tl.store(copy_count, num_placed)
    for start in range(0, num_ids, CHUNK):
        at = start + tl.arange(0, CHUNK)
        id = tl.load(ids + at, at < num_ids, -1).to(tl.int32)
        found = tl.max(tl.where((id[:, None] == expert[None, :]) & wanted[None, :], place[None, :], -1), 1)
        tl.store(slots_out + at, found, at < num_ids)
    num_hits = tl.sum(hit.to(tl.int32), 0)
    num_late_hits = tl.sum(late.to(tl.int32), 0)
    _count(counters, _HITS, num_hits - num_late_hits)
    _count(counters, _LATE_HITS, num_late_hits)
    _count(counters, _MISSES, num_misses)
    _count(counters, _USED, tl.sum(used.to(tl.int32), 0))
    _count(counters, _SHORTAGES, num_misses - num_placed)
    _count(counters, _EVICTIONS, num_evicted)
    _count(counters, _WASTED, num_wasted)
    tl.store(marks + _CLOCK, now)
    tl.store(marks + _PINNED, now)


@triton.jit
def prefetch_kernel(
    guesses, num_guesses, base, num_experts, num_slots, staging_slots,
    slot_of_key, key_of_slot, staged_at, stamp, in_flight, marks, counters,
    copy_keys, copy_slots, copy_count,
    GUESSES: tl.constexpr, SLOTS: tl.constexpr, ARRIVED: tl.constexpr,
):  # fmt: skip
    """See `paging.plan_prefetch`."""
    at = tl.arange(0, GUESSES)
    slot = tl.arange(0, SLOTS)
    id = tl.load(guesses + at, at < num_guesses, -1).to(tl.int32)
    is_expert = (id >= 0) & (id < num_experts)
    # Of duplicates the first counts.
    again = tl.sum(((id[:, None] == id[None, :]) & (at[None, :] < at[:, None])).to(tl.int32), 1)
    guessed = is_expert & (again == 0)
    key = base + id
    place = tl.load(slot_of_key + key, guessed, -1)
    present = guessed & (place >= 0)
    absent = guessed & (place < 0)
    if ARRIVED:
        tl.store(in_flight + slot, tl.zeros_like(slot), slot < num_slots)
        is_loaded = present
    else:
        is_loaded = present & (tl.load(in_flight + place, present, 0) == _LOADED)
    renewed = is_loaded & (tl.load(staged_at + place, present, 0) > 0)
    num_staged = tl.sum((tl.load(staged_at + slot, slot < num_slots, 0) > 0).to(tl.int32), 0)
    order = _order_of(key_of_slot, stamp, staged_at, in_flight, slot, num_slots, tl.load(marks + _PINNED), ARRIVED)
    # No guess is evicted for another one. Computed before ages change, so that nothing has to be read again.
    num_absent = tl.sum(absent.to(tl.int32), 0)
    num_kept = tl.sum(present.to(tl.int32), 0)
    absent_rank = tl.cumsum(absent.to(tl.int32), 0) - 1
    room = tl.minimum(staging_slots - num_staged, num_absent)
    num_cold, num_taken, num_evicted, num_wasted = 0, 0, 0, 0
    for _ in range(num_absent + num_kept):
        # Evict cold ones while there is room, then staged ones.
        candidates = tl.where((order >= _STAGED) == (num_cold >= room), order, _NEVER)
        lowest = tl.min(candidates, 0)
        if (lowest == _NEVER) & (num_cold < room):
            # Nothing is cold: only staged ones from now on.
            room = num_cold
            lowest = tl.min(tl.where(order >= _STAGED, order, _NEVER), 0)
        if (lowest != _NEVER) & (num_taken < num_absent):
            victim = tl.min(tl.where(order == lowest, slot, SLOTS), 0)
            order = tl.where(slot == victim, _NEVER, order)
            if tl.sum((present & (place == victim)).to(tl.int32), 0) == 0:
                _vacate(slot_of_key, key_of_slot, victim)
                num_evicted += (lowest >= 0).to(tl.int32)
                num_wasted += (lowest >= _STAGED).to(tl.int32)
                place = tl.where(absent & (absent_rank == num_taken), victim, place)
                num_taken += 1
                if lowest < _STAGED:
                    num_cold += 1
    placed = absent & (place >= 0)
    sequence = tl.load(marks + _SEQUENCE)
    num_renewed = tl.sum(renewed.to(tl.int32), 0)
    renewed_at = sequence + tl.cumsum(renewed.to(tl.int64), 0)
    placed_at = sequence + num_renewed + 1 + absent_rank
    tl.debug_barrier()
    tl.store(staged_at + place, renewed_at, renewed)
    tl.store(slot_of_key + key, place, placed)
    tl.store(key_of_slot + place, key, placed)
    tl.store(staged_at + place, placed_at, placed)
    tl.store(in_flight + place, tl.zeros_like(place) + _IN_FLIGHT, placed)
    tl.store(copy_keys + absent_rank, key, placed)
    tl.store(copy_slots + absent_rank, place, placed)
    tl.store(copy_count, num_taken)
    _count(counters, _PREFETCHED, num_taken)
    _count(counters, _EVICTIONS, num_evicted)
    _count(counters, _WASTED, num_wasted)
    tl.store(marks + _SEQUENCE, sequence + num_renewed + num_taken)
