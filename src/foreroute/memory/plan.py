"""Divide the fast memory once, at load: expert slots, KV cache, host memory behind a GPU."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from foreroute.checkpoint.codecs import STORED
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.records import PackedStore
from foreroute.config import EngineConfig
from foreroute.memory import host
from foreroute.memory.budget import SlotPlan, plan_pool
from foreroute.memory.device import DEVICE_KV_TOKENS, check_room, check_store, choose_budget, host_records
from foreroute.memory.kv import kv_bytes_without_experts
from foreroute.memory.serving import fit_serving
from foreroute.memory.serving_budget import ServingNeeds, check_serving
from foreroute.model.expert_set import ExpertSet
from foreroute.policy import Policy


@dataclass(frozen=True)
class RoomBefore:
    """Host memory figures from before any weight was read; both in bytes.

    free_bytes: RAM that was free. budget_bytes: its part for experts, as asked or as chosen without a KV cache.
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
    asked: EngineConfig, target: torch.device, kept: ExpertTable, store: PackedStore | None, config: Any, dense: int
) -> RoomBefore | None:
    """Check early that the model can fit, and on the host measure free RAM. None where a GPU (`target`) holds the pool.

    Args:
        asked: the configuration. kept: the experts as they will be read, from `store` if given. config: of the model.
        dense: bytes of the dense part.
    Raises:
        BudgetError, DeviceError: it cannot fit; or the store cannot be computed on the device.
    """
    if target.type == "cuda":
        check_store(store, STORED)
        check_room(target, asked, config, dense)
        return None
    free = host.available_ram()
    budget = host.choose_memory(asked.memory, kept, dense, free_ram_bytes=free)
    if asked.kv_tokens is not None and asked.memory is not None:
        # The KV cache is not known yet.
        check_serving(ServingNeeds(dense, min(budget, kept.whole_bytes), 0, 0, 0), free, 0)
    return RoomBefore(free, budget)


def plan_memory(
    asked: EngineConfig, target: torch.device, model: PreTrainedModel, experts: ExpertSet, before: RoomBefore | None
) -> MemoryPlan:
    """Divide memory once the dense part is in host memory; on a GPU it is counted, and moves there next.

    Args:
        asked: the configuration. target: the device of the slots. model, experts: as built. before: of `check_before`.

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
            budget = _beside_kv_cache(asked, model, experts, before, kv_bytes)
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
    asked: EngineConfig, model: PreTrainedModel, experts: ExpertSet, before: RoomBefore, kv_bytes_per_token: int
) -> int:
    """The budget in bytes that leaves room for the reserved KV cache."""
    behind = 0
    if asked.host_memory is not None:
        behind = host_records(asked, before.free_bytes, experts.table) * experts.table.slot_bytes
    return fit_serving(asked, model, experts, before.budget_bytes, before.free_bytes, kv_bytes_per_token, behind)
