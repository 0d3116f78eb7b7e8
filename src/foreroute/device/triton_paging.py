"""The operations of device/paging.py as Triton kernels: same names, same arguments, same decisions.

Nothing here copies to the host, allocates, or has a shape that depends on data, so that all of it can be captured in a
CUDA graph. Planners of one state have to run in one stream; triton_planners.py says why they have no races.

`fetch` is bound by the link. It needs bytes in flight (bandwidth times latency, about 100 KiB for PCIe 5), not many
SMs: 16 programs with 16 KiB each are in flight. Its programs write disjoint pieces of disjoint slots.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton decides which parameters are tensors and which numbers.

import torch
import triton
import triton.language as tl

from foreroute.device.paging import CopyList, PagingState, release
from foreroute.device.triton_planners import plan_kernel, prefetch_kernel

__all__ = ["fetch", "plan", "plan_prefetch", "release"]

_CHUNK = 64
_FETCH_WORDS = 4096


@triton.jit
def _fetch(
    arena_address, record_offsets, copy_keys, copy_slots, copy_count, slots, slot_words, record_words,
    WORDS: tl.constexpr,
):  # fmt: skip
    word = tl.arange(0, WORDS)
    blocks = tl.cdiv(record_words, WORDS)
    # All programs work on one record after the other, so that the list's first record is complete first.
    for block in range(tl.program_id(0), tl.load(copy_count) * blocks, tl.num_programs(0)):
        at = block // blocks
        offset = tl.load(record_offsets + tl.load(copy_keys + at))
        target = tl.load(copy_slots + at).to(tl.int64) * slot_words
        words = (block % blocks) * WORDS + word
        # A key without a record has a negative offset. Not `&`: the interpreter makes no mask of a vector and a scalar.
        mask = words < tl.where(offset >= 0, record_words, 0)
        # Hinted on the pointer: the cast loses the address's alignment, and 4-byte loads would follow.
        record = tl.multiple_of((arena_address + offset).to(tl.pointer_type(tl.int32)), 16)
        source = record + words
        values = tl.load(source, mask, eviction_policy="evict_first")
        tl.store(slots + target + words, values, mask)


def plan(
    state: PagingState, layer: int, ids: torch.Tensor, slots: torch.Tensor, copies: CopyList, *, arrived: bool
) -> None:
    """See `paging.plan`. ids, slots: [tokens, k]."""
    assert copies.keys.numel() >= min(ids.numel(), state.num_experts), "a demand may be longer than its list"
    plan_kernel[(1,)](
        ids.contiguous(), ids.numel(), layer * state.num_experts, state.num_experts, state.num_slots,
        state.slot_of_key, state.key_of_slot, state.stamp, state.staged_at, state.in_flight, state.marks,
        state.counters, slots, copies.keys, copies.slots, copies.count,
        EXPERTS=triton.next_power_of_2(state.num_experts), SLOTS=triton.next_power_of_2(state.num_slots),
        CHUNK=_chunk(ids), ARRIVED=arrived, num_warps=_warps(state),
    )  # fmt: skip


def plan_prefetch(state: PagingState, layer: int, guesses: torch.Tensor, copies: CopyList, *, arrived: bool) -> None:
    """See `paging.plan_prefetch`. guesses: [n], compared pairwise: n <= 256."""
    assert guesses.numel() <= 256, f"{guesses.numel()} guesses"
    assert copies.keys.numel() >= min(guesses.numel(), state.num_experts), "guesses may be more than their list holds"
    prefetch_kernel[(1,)](
        guesses.contiguous(), guesses.numel(), layer * state.num_experts, state.num_experts, state.num_slots,
        state.staging_slots, state.slot_of_key, state.key_of_slot, state.staged_at, state.stamp, state.in_flight,
        state.marks, state.counters, copies.keys, copies.slots, copies.count,
        GUESSES=triton.next_power_of_2(guesses.numel()), SLOTS=triton.next_power_of_2(state.num_slots),
        ARRIVED=arrived, num_warps=_warps(state),
    )  # fmt: skip


def fetch(
    arena_address: int,
    record_offsets: torch.Tensor,
    copies: CopyList,
    slots: torch.Tensor,
    *,
    record_bytes: int,
    num_programs: int = 16,
) -> None:
    """See `paging.fetch`. slots: [num_slots, slot_bytes]. Loads 16 bytes a lane, 16 KiB a program at a time."""
    slot_bytes = slots.shape[1]
    assert record_bytes % 16 == 0, f"records of {record_bytes} bytes: not a multiple of 16"
    assert record_bytes <= slot_bytes, f"records of {record_bytes} bytes in slots of {slot_bytes}"
    assert slot_bytes % 16 == arena_address % 16 == 0, "slots and arena are not aligned to 16"
    _fetch[(num_programs,)](
        arena_address, record_offsets, copies.keys, copies.slots, copies.count, slots.view(torch.int32),
        slot_bytes // 4, record_bytes // 4, WORDS=_FETCH_WORDS, num_warps=8,
    )  # fmt: skip


def _chunk(ids: torch.Tensor) -> int:
    return min(triton.next_power_of_2(ids.numel()), _CHUNK)


def _warps(state: PagingState) -> int:
    """Number of warps that keep the order of the slots in registers."""
    return min(max(triton.next_power_of_2(state.num_slots) // 512, 4), 16)
