"""Build the device control plane of a model: arena, pool, paging and math, for a GPU or for CPU tests."""

import importlib
from collections.abc import Callable, Sequence
from typing import cast

import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.config import EngineConfig
from foreroute.device import paging
from foreroute.device.overlap import LayerBuffers
from foreroute.device.paging import PagingState
from foreroute.device.slot_math import GatheredSlotMath, KernelSlotMath, PlainSlotMath, form_of
from foreroute.device.tier import DeviceTier, GuessNext, Paging, SlotMath
from foreroute.engine.approximation import Approximation
from foreroute.errors import DeviceError
from foreroute.kernels.slot_views import SlotViews
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.memory.budget import SlotPlan
from foreroute.model.blocks import MoeLayer
from foreroute.model.expert_set import ExpertSet
from foreroute.predict.build import lookahead
from foreroute.transfer.memory import Arena, out_of_memory_named
from foreroute.transfer.placing import LESS_MEMORY, fill_arena
from foreroute.types import Progress


def build_tier(
    asked: EngineConfig, experts: ExpertSet, slots: SlotPlan, approximation: Approximation, progress: Progress
) -> DeviceTier:
    """Build the tier of `experts`, and load its arena.

    Args:
        asked: the config. slots: the pool's size. approximation: the policies. progress: (done, of all) of loading.
    Raises:
        DeviceError: math unknown, or memory cannot be allocated or pinned. ReadError, ChecksumError: of an expert.
    """
    layers, table, dtype, device = experts.layers, experts.table, experts.dtype, experts.device
    if any(layer.in_encoder for layer in layers):
        raise DeviceError(
            "--control device computes a token through all MoE layers, and an encoder's are not a token's. "
            "Use --control host."
        )
    own_math = [entry for entry in experts.math if entry is not None]
    if len(own_math) < len(layers):
        raise DeviceError(
            f"--control device computes experts itself, and those of {type(layers[0].experts).__name__} are computed "
            "by their family's own code. Use --control host."
        )
    arena, keys = fill_arena(
        asked, table, experts.store, table.total_slots, is_pinned=device.type == "cuda", progress=progress
    )
    try:
        staging = slots.staging_slots if asked.prefetch != "none" else 0
        return assemble_tier(
            layers, table, arena, keys, slots.num_slots, staging, own_math, dtype, device, approximation,
            guess=lookahead(layers, dtype).guess, width=asked.prefetch_width,
        )  # fmt: skip
    except BaseException:
        arena.close()
        raise


def assemble_tier(
    layers: Sequence[MoeLayer],
    table: ExpertTable,
    arena: Arena,
    keys: Sequence[int],
    num_slots: int,
    staging_slots: int,
    math: Sequence[ExpertMath],
    dtype: torch.dtype,
    device: torch.device,
    approximation: Approximation,
    *,
    guess: GuessNext,
    width: int | None = None,
) -> DeviceTier:
    """Build the tier over a loaded arena with records in the order of `keys`.

    Args:
        layers, table, math: per MoE layer. num_slots, staging_slots: of the pool. dtype: of compute.
        approximation: the policies. guess: predicts the next layer's experts, `width` per row; None: top-k.
    Raises:
        DeviceError: the device has too little memory.
    """
    with out_of_memory_named(f"{num_slots} experts' slots and two layers' buffers", LESS_MEMORY):
        pool = torch.empty(num_slots, table.slot_bytes, dtype=torch.uint8, device=device)
        state = PagingState.create(
            num_slots, table.num_keys, table.num_experts, staging_slots=staging_slots, device=device
        )
        first_records, filled = [], 0
        for layer in table.layers:
            first_records.append(filled)
            filled += layer.num_experts
        buffers = LayerBuffers(table, arena.tensor, first_records, math, dtype, device)
    operations, slot_math, clear = _operations(layers, table, pool, math, dtype)
    return DeviceTier(
        table,
        arena,
        keys,
        pool,
        state,
        operations,
        slot_math,
        buffers,
        [layer.top_k for layer in layers],
        guess,
        approximation,
        width=width,
        clear=clear,
    )


def _operations(
    layers: Sequence[MoeLayer],
    table: ExpertTable,
    pool: torch.Tensor,
    math: Sequence[ExpertMath],
    dtype: torch.dtype,
) -> tuple[Paging, SlotMath, Callable[[], None]]:
    """Return the paging operations, the math, and what drops the math's pool: Triton's on a GPU, else plain ones.

    Raises:
        DeviceError: the kernels cannot be imported.
    """
    layouts = [layer.layout for layer in table.layers]
    if pool.device.type == "cpu":
        views = SlotViews(pool.view(-1), table.slot_bytes, layouts, math, dtype)
        return paging, PlainSlotMath(views, math), views.clear
    try:
        kernels = importlib.import_module("foreroute.device.triton_paging")
        experts = importlib.import_module("foreroute.kernels.triton.experts").experts
    except ImportError as error:
        raise DeviceError(f"--control device: its kernels cannot be loaded ({error}). Use --control host.") from error
    found = [
        form_of(layer.experts, layout, entry, dtype) for layer, layout, entry in zip(layers, layouts, math, strict=True)
    ]
    forms = [form for form in found if form is not None]
    if len(forms) == len(layers):
        through_slots = KernelSlotMath(experts, pool, forms)
        return cast(Paging, kernels), through_slots, through_slots.clear
    gathered = GatheredSlotMath(pool, layouts, math, dtype)
    return cast(Paging, kernels), gathered, gathered.clear
