"""Divide the fast memory once, at load: expert slots, KV cache, host memory behind a GPU, and on it the dense part."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from foreroute.checkpoint.codecs import STORED, orders_of
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.records import PackedStore
from foreroute.config import EngineConfig
from foreroute.errors import BudgetError, DeviceError
from foreroute.memory import host
from foreroute.memory.budget import (
    DeviceNeeds,
    SlotPlan,
    check_dense,
    choose_device_memory,
    choose_host_records,
    plan_pool,
    prefill_bytes,
)
from foreroute.memory.serving import fit_serving, kv_bytes_without_experts
from foreroute.memory.serving_budget import CHOSEN_RESERVE_BYTES, ServingNeeds, check_serving
from foreroute.model.expert_set import ExpertSet
from foreroute.policy import Policy
from foreroute.transfer.memory import memory_of, out_of_memory_named
from foreroute.transfer.placing import LESS_MEMORY
from foreroute.units import format_memory, parse_memory

# Tokens of KV cache that a GPU reserves memory for by default.
DEVICE_KV_TOKENS = 4096
# Rows of the largest decode graph (generation/graph_decoder.py).
MAX_GRAPH_ROWS = 8


@dataclass(frozen=True)
class RoomBefore:
    """Host memory figures from before any weight was read; both in bytes.

    free_bytes: RAM that was free, without what a draft takes. budget_bytes: its part for experts, as asked or as chosen
    without a KV cache.
    """

    free_bytes: int
    budget_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """The division of memory.

    budget_bytes: fast tier for experts. slots: the pool that it buys. staging_slots: the most of them that prefetched
    experts may take. host_records: experts in host memory behind the pool; 0 where only the disk is behind it.
    kv_tokens: tokens of KV cache to reserve memory for. kv_bytes_per_token: None where it was not measured.
    """

    budget_bytes: int
    slots: SlotPlan
    staging_slots: int
    host_records: int
    kv_tokens: int
    kv_bytes_per_token: int | None


def check_before(
    asked: EngineConfig,
    target: torch.device,
    kept: ExpertTable,
    store: PackedStore | None,
    config: Any,
    dense: int,
    draft_bytes: int = 0,
) -> RoomBefore | None:
    """Check early that the model can fit, and on the host measure free RAM. None where a GPU (`target`) holds the pool.

    Args:
        asked: the configuration. kept: the experts as they will be read, from `store` if given. config: of the model.
        dense: bytes of the dense part. draft_bytes: of a model that drafts for this one, in RAM beside it.
    Raises:
        BudgetError, DeviceError: it cannot fit; or the store cannot be computed on the device.
    """
    if target.type == "cuda":
        check_store(store, STORED)
        check_room(target, asked, config, dense)
        return None
    free = max(0, host.available_ram() - draft_bytes)
    budget = choose_memory(asked.memory, kept, dense, free_ram_bytes=free)
    if asked.kv_tokens is not None and asked.memory is not None:
        # The KV cache is not known yet.
        check_serving(ServingNeeds(dense, min(budget, kept.whole_bytes), 0, 0, 0), free, 0)
    return RoomBefore(free, budget)


def plan_memory(
    asked: EngineConfig,
    target: torch.device,
    model: PreTrainedModel,
    experts: ExpertSet,
    before: RoomBefore | None,
    draft_bytes_per_token: int = 0,
) -> MemoryPlan:
    """Divide memory once the dense part is in host memory; on a GPU it is counted, and moves there next.

    Args:
        asked: the configuration. target: the device of the slots. model, experts: as built. before: of `check_before`.
        draft_bytes_per_token: of the cache that a draft has of its own.

    Raises:
        BudgetError, DeviceError: it does not fit; names what to lower.
    """
    pages_itself = asked.control == "device"
    kv_bytes = None
    if before is None:
        budget = choose_budget(target, asked, model, experts)
    else:
        budget = before.budget_bytes
        if asked.kv_tokens is not None and not pages_itself:
            kv_bytes = kv_bytes_without_experts(model, experts.layers)
            budget = _beside_kv_cache(asked, model, experts, before, kv_bytes, draft_bytes_per_token)
    table = experts.table
    slots = plan_pool(budget, table.slot_lengths, table.keys.widths, experts.top_k)
    has_host_tier = target.type == "cuda" or pages_itself or asked.host_memory is not None
    return MemoryPlan(
        budget,
        slots,
        staging_slots=slots.staging_slots if asked.prefetch != "none" or Policy.parse(asked.policy).substitutes else 0,
        host_records=host_records(asked, host.available_ram(), table) if has_host_tier else 0,
        kv_tokens=asked.kv_tokens or (DEVICE_KV_TOKENS if target.type == "cuda" or pages_itself else 0),
        kv_bytes_per_token=kv_bytes,
    )


def _beside_kv_cache(
    asked: EngineConfig, model: PreTrainedModel, experts: ExpertSet, before: RoomBefore, kv_bytes: int, draft_bytes: int
) -> int:
    """The budget in bytes that leaves room for the reserved KV cache and a draft's, both given in bytes per token."""
    behind = 0
    if asked.host_memory is not None:
        behind = host_records(asked, before.free_bytes, experts.table) * experts.table.slot_bytes
    free = before.free_bytes
    return fit_serving(asked, model, experts, before.budget_bytes, free, kv_bytes, behind, draft_bytes)


def choose_memory(
    asked: int | str | None,
    table: ExpertTable,
    dense_bytes: int,
    beside_bytes: int = 0,
    free_ram_bytes: int | None = None,
) -> int:
    """Choose the budget in bytes: as asked, or the free RAM beside the dense part and a reserve.

    Args:
        asked: as --memory. table: the experts. dense_bytes: of the dense part.
        beside_bytes: of KV cache, where it is reserved. free_ram_bytes: None measures it now.
    Raises:
        BudgetError: not a size, or more than this process may have.
    """
    whole = table.whole_bytes
    if asked is not None:
        budget, there = parse_memory(asked, whole), host.ram()
        if budget > there.total_bytes and budget > whole:
            raise BudgetError(
                f"--memory {asked} is more than {there}, and more than all experts need ({format_memory(whole)})."
            )
        if min(budget, whole) > there.total_bytes:
            raise BudgetError(f"--memory {asked} is more than {there}. Leave --memory out to have it chosen.")
        return budget
    free = host.available_ram() if free_ram_bytes is None else free_ram_bytes
    return min(whole, max(0, free - dense_bytes - CHOSEN_RESERVE_BYTES - beside_bytes))


def check_store(store: PackedStore | None, stored: str) -> None:
    """Check that the experts of `store` are in the codec `stored`, which a device can compute.

    Raises:
        DeviceError: they are quantised for the CPU, or laid out for its kernels.
    """
    if store is not None and orders_of(store.table):
        raise DeviceError(
            f"{store.path} has eight rows of a matrix side by side, for kernels of the CPU. Pack the model again with "
            "`foreroute pack --layout plain --force`, or use --packed no."
        )
    if store is not None and store.codec != stored:
        raise DeviceError(
            f"{store.codec} stores are computed by kernels of the CPU and are not supported yet with experts on a GPU. "
            "Use --packed no, or leave --device out."
        )


def check_room(device: torch.device, asked: EngineConfig, config: Any, dense_bytes: int) -> None:
    """Before any weight is read: check that everything but experts and KV cache, which is unknown yet, may fit.

    Args:
        device: the GPU. asked: the configuration. config: of the model. dense_bytes: of the dense part.
    Raises:
        DeviceError: it cannot.
    """
    text = config.get_text_config()
    chunk = prefill_bytes(asked.prefill_chunk, text.hidden_size, text.vocab_size, itemsize=2)
    check_dense(DeviceNeeds(dense_bytes, 0, chunk), *memory_of(device))


def choose_budget(device: torch.device, asked: EngineConfig, model: PreTrainedModel, experts: ExpertSet) -> int:
    """Bytes of `device` for `experts`, beside the dense part of `model` and all memory of computing, within `asked`.

    Raises:
        DeviceError, BudgetError: it does not fit.
    """
    text, itemsize = model.config.get_text_config(), experts.dtype.itemsize
    table = experts.table
    needs = DeviceNeeds(
        dense_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        kv_bytes=kv_bytes_without_experts(model, experts.layers)
        * (asked.kv_tokens or min(DEVICE_KV_TOKENS, _longest(text))),
        prefill_bytes=prefill_bytes(asked.prefill_chunk, text.hidden_size, text.vocab_size, itemsize),
        buffer_bytes=2 * table.num_experts * table.slot_bytes if asked.control == "device" else 0,
        max_rows=MAX_GRAPH_ROWS if asked.control == "device" else 0,
    )
    free_and_total = memory_of(device)
    return choose_device_memory(asked.memory, needs, *free_and_total, experts.total_bytes, experts.token_demand_bytes)


def move_dense(model: PreTrainedModel, device: torch.device) -> None:
    """Move the dense part of `model` to `device`.

    Raises:
        DeviceError: the allocation failed.
    """
    with out_of_memory_named("the dense weights", LESS_MEMORY):
        model.to(device)


def host_records(asked: EngineConfig, available_bytes: int, table: ExpertTable) -> int:
    """Experts of `table` to hold in host RAM (`available_bytes` free), as `asked`. Raises: `choose_host_records`'."""
    return choose_host_records(
        asked.host_memory,
        available_bytes,
        table.slot_bytes,
        table.total_slots,
        must_hold_all=asked.control == "device",
    )


def _longest(text_config: Any) -> int:
    return int(getattr(text_config, "max_position_embeddings", None) or 2**31)
