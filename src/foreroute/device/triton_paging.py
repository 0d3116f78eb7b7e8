"""device/paging.py's operations as Triton kernels: same names, same arguments, same decisions.

Nothing here reads anything back, allocates, or has a shape that depends on data, so that all of it can be captured in a
CUDA graph. Planners of one state have to be in one stream; why they have no races is in triton_planners.py.

`fetch` is bound by the link. It needs bytes in flight (bandwidth times latency, about 100 KiB for PCIe 5), not many
SMs: 16 programs with 16 KiB each are in flight. Its programs write disjoint pieces of disjoint slots.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's parameters are tensors or numbers as it sees fit.

import torch
import triton
import triton.language as tl

from foreroute.device.paging import CopyList, PagingState, release
from foreroute.device.triton_planners import STOOD_IN, THERE, add_to, fill_kernel, plan_kernel, prefetch_kernel

__all__ = ["decide", "fetch", "plan", "plan_fill", "plan_prefetch", "release"]

_TOLERANCE, _SPECULATIVE = tl.constexpr(1), tl.constexpr(2)
_CHUNK = 64
_FETCH_WORDS = 4096


@triton.jit
def _decide(
    ids, weights, rules, taus, num_tokens, top_k, base, num_experts,
    slot_of_key, in_flight, counters, waited_out, stood_in_out,
    TOKENS: tl.constexpr, CHOICES: tl.constexpr, EXPERTS: tl.constexpr, ARRIVED: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, TOKENS)
    choice = tl.arange(0, CHOICES)
    expert = tl.arange(0, EXPERTS)
    is_token = token < num_tokens
    at = token[:, None] * top_k + choice[None, :]
    is_choice = is_token[:, None] & (choice < top_k)[None, :]
    id = tl.load(ids + at, is_choice, -1).to(tl.int32)
    is_expert = is_choice & (id >= 0) & (id < num_experts)
    place = tl.load(slot_of_key + base + id, is_expert, 0)
    if ARRIVED:
        miss = is_expert & (place < 0)
    else:
        miss = is_expert & ((place < 0) | (tl.load(in_flight + place, is_expert & (place >= 0), 0) != THERE))
    mass = tl.where(is_expert, tl.load(weights + at, is_choice, 0.0).to(tl.float64), 0.0)
    rule = tl.load(rules + token, is_token, 0)
    # In the order in which the rules in Python add: doubles, one after the other.
    total = tl.zeros_like(tl.sum(mass, 1))
    for position in range(top_k):
        total += tl.sum(tl.where(choice[None, :] == position, mass, 0.0), 1)
    allowed = tl.load(taus + token, is_token, 0.0) * total
    left = miss
    dropped = miss & (rule == _SPECULATIVE)[:, None]
    is_open = rule == _TOLERANCE
    so_far = tl.zeros_like(total)
    for _ in range(top_k):
        smallest = tl.min(tl.where(left, mass, float("inf")), 1)
        first = tl.min(tl.where(left & (mass == smallest[:, None]), choice[None, :], CHOICES), 1)
        picked = left & (choice[None, :] == first[:, None])
        so_far += tl.where(first < CHOICES, smallest, 0.0)
        is_open = is_open & (first < CHOICES) & (so_far <= allowed)
        dropped = dropped | (picked & is_open[:, None])
        left = left & ~picked
    # What one token waits for is there for all of them.
    chosen = tl.reshape(id, (TOKENS * CHOICES,))
    needed = tl.reshape(miss & ~dropped, (TOKENS * CHOICES,))
    out = tl.reshape(dropped, (TOKENS * CHOICES,))
    is_same = chosen[:, None] == chosen[None, :]
    stood_in = out & (tl.max((is_same & needed[None, :]).to(tl.int32), 1) == 0)
    flat_at, flat_is_choice = tl.reshape(at, (TOKENS * CHOICES,)), tl.reshape(is_choice, (TOKENS * CHOICES,))
    flat_is_expert = tl.reshape(is_expert, (TOKENS * CHOICES,))
    tl.store(stood_in_out + flat_at, tl.where(stood_in, chosen, -1), flat_is_choice)
    tl.store(waited_out + flat_at, tl.where(flat_is_expert & ~stood_in, chosen, -1), flat_is_choice)
    is_stood_in = tl.max(((chosen[:, None] == expert[None, :]) & stood_in[:, None]).to(tl.int32), 0)
    add_to(counters, STOOD_IN, tl.sum(is_stood_in, 0))


@triton.jit
def _fetch(
    arena_address, record_offsets, copy_keys, copy_slots, copy_count, slots, slot_words, record_words,
    WORDS: tl.constexpr,
):  # fmt: skip
    word = tl.arange(0, WORDS)
    blocks = tl.cdiv(record_words, WORDS)
    # All programs work on one record after the other, so that the first of the list is there first.
    for block in range(tl.program_id(0), tl.load(copy_count) * blocks, tl.num_programs(0)):
        at = block // blocks
        offset = tl.load(record_offsets + tl.load(copy_keys + at))
        target = tl.load(copy_slots + at).to(tl.int64) * slot_words
        words = (block % blocks) * WORDS + word
        # A key without a record has a negative offset. Not `&`: the interpreter makes no mask of a vector and a scalar.
        mask = words < tl.where(offset >= 0, record_words, 0)
        # Said of the pointer itself: what is known of the address is lost when it becomes one, and 4-byte loads follow.
        record = tl.multiple_of((arena_address + offset).to(tl.pointer_type(tl.int32)), 16)
        source = record + words
        values = tl.load(source, mask, eviction_policy="evict_first")
        tl.store(slots + target + words, values, mask)


def plan(
    state: PagingState, layer: int, ids: torch.Tensor, slots: torch.Tensor, copies: CopyList, *, arrived: bool
) -> None:
    """See `paging.plan`."""
    assert copies.keys.numel() >= min(ids.numel(), state.num_experts), "a demand may be longer than its list"
    plan_kernel[(1,)](
        ids.contiguous(), ids.numel(), layer * state.num_experts, state.num_experts, state.num_slots,
        state.slot_of_key, state.key_of_slot, state.stamp, state.staged_at, state.in_flight, state.marks,
        state.counters, slots, copies.keys, copies.slots, copies.count,
        EXPERTS=triton.next_power_of_2(state.num_experts), SLOTS=triton.next_power_of_2(state.num_slots),
        CHUNK=_chunk(ids), ARRIVED=arrived, num_warps=_warps(state),
    )  # fmt: skip


def plan_prefetch(state: PagingState, layer: int, guesses: torch.Tensor, copies: CopyList, *, arrived: bool) -> None:
    """See `paging.plan_prefetch`. Guesses are compared pairwise: at most 256 of them."""
    assert guesses.numel() <= 256, f"{guesses.numel()} guesses"
    assert copies.keys.numel() >= min(guesses.numel(), state.num_experts), "guesses may be more than their list holds"
    prefetch_kernel[(1,)](
        guesses.contiguous(), guesses.numel(), layer * state.num_experts, state.num_experts, state.num_slots,
        state.staging_slots, state.slot_of_key, state.key_of_slot, state.staged_at, state.stamp, state.in_flight,
        state.marks, state.counters, copies.keys, copies.slots, copies.count,
        GUESSES=triton.next_power_of_2(guesses.numel()), SLOTS=triton.next_power_of_2(state.num_slots),
        ARRIVED=arrived, num_warps=_warps(state),
    )  # fmt: skip


def plan_fill(state: PagingState, layer: int, ids: torch.Tensor, copies: CopyList, *, arrived: bool) -> None:
    """See `paging.plan_fill`."""
    assert copies.keys.numel() >= min(ids.numel(), state.num_experts), "a fill may be longer than its list"
    fill_kernel[(1,)](
        ids.contiguous(), ids.numel(), layer * state.num_experts, state.num_experts, state.num_slots,
        state.filling_slots, state.slot_of_key, state.key_of_slot, state.stamp, state.staged_at, state.in_flight,
        state.marks, state.counters, copies.keys, copies.slots, copies.count,
        EXPERTS=triton.next_power_of_2(state.num_experts), SLOTS=triton.next_power_of_2(state.num_slots),
        CHUNK=_chunk(ids), ARRIVED=arrived, num_warps=_warps(state),
    )  # fmt: skip


def decide(
    state: PagingState,
    layer: int,
    ids: torch.Tensor,
    weights: torch.Tensor,
    rules: torch.Tensor,
    taus: torch.Tensor,
    waited: torch.Tensor,
    stood_in: torch.Tensor,
    *,
    arrived: bool,
) -> None:
    """See `paging.decide`. Choices are compared pairwise: at most 256 of them."""
    num_tokens, top_k = ids.shape
    assert ids.numel() <= 256, f"{ids.numel()} choices"
    _decide[(1,)](
        ids.contiguous(), weights.contiguous(), rules, taus, num_tokens, top_k, layer * state.num_experts,
        state.num_experts, state.slot_of_key, state.in_flight, state.counters, waited, stood_in,
        TOKENS=triton.next_power_of_2(num_tokens), CHOICES=triton.next_power_of_2(top_k),
        EXPERTS=triton.next_power_of_2(state.num_experts), ARRIVED=arrived, num_warps=4,
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
    """See `paging.fetch`. Sixteen bytes a lane and load, 16 KiB a program at a time."""
    slot_bytes = slots.shape[1]
    assert record_bytes % 16 == 0, f"records of {record_bytes} bytes are no whole 16s"
    assert record_bytes <= slot_bytes, f"records of {record_bytes} bytes in slots of {slot_bytes}"
    assert slot_bytes % 16 == arena_address % 16 == 0, "slots and arena are no whole 16s"
    _fetch[(num_programs,)](
        arena_address, record_offsets, copies.keys, copies.slots, copies.count, slots.view(torch.int32),
        slot_bytes // 4, record_bytes // 4, WORDS=_FETCH_WORDS, num_warps=8,
    )  # fmt: skip


def _chunk(ids: torch.Tensor) -> int:
    return min(triton.next_power_of_2(ids.numel()), _CHUNK)


def _warps(state: PagingState) -> int:
    """Enough that the order of the slots stays in registers."""
    return min(max(triton.next_power_of_2(state.num_slots) // 512, 4), 16)
