"""The composition root: from a path and a budget to a transformers model whose experts come and go.

Everything that can be wrong is found before the first expert is read, in this order: the folder, its headers, the
model, the budget, the dense weights.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, cast

import torch

from foreroute.checkpoint.codecs import STORED
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.locate import locate, read_index
from foreroute.checkpoint.records import open_store
from foreroute.config import EngineConfig, Plan
from foreroute.device.build import build_tier
from foreroute.engine.approximation import Approximation
from foreroute.engine.combine import Workspace
from foreroute.engine.interfaces import Predictor
from foreroute.engine.moe_step import Runtime
from foreroute.engine.step_trace import StepTrace, header_of
from foreroute.errors import ForerouteError
from foreroute.kernels.slot_views import SlotViews
from foreroute.kernels.torch.experts import ExpertMath, OneToken
from foreroute.kernels.torch.quant import QuantisedMath, QuantisedToken
from foreroute.loading.expert_math import family_forward_over, math_of_layers, stored_operands
from foreroute.loading.offloaded_model import ForerouteHandle, make_offloaded
from foreroute.loading.open_device import open_device
from foreroute.loading.policies import approximation
from foreroute.memory.budget import plan_slots
from foreroute.memory.device import DEVICE_KV_TOKENS, check_room, check_store, host_records, move_and_choose
from foreroute.memory.host import available_ram, choose_memory
from foreroute.memory.kv import kv_bytes_without_experts
from foreroute.memory.serving import fit_serving, learning_limit
from foreroute.memory.serving_budget import ServingNeeds, check_serving
from foreroute.model.blocks import MoeLayer, on_device, probe
from foreroute.model.skeleton import load_skeleton, offloaded_modules, outline
from foreroute.policy import Policy
from foreroute.predict.build import check_layout, lookahead, open_sidecar, prefetch_guesses
from foreroute.predict.governor import Governor
from foreroute.predict.learner import Learner
from foreroute.residency.eviction import eviction_of
from foreroute.residency.slots import Residency
from foreroute.trace import open_trace
from foreroute.transfer.arena import Progress
from foreroute.transfer.placing import Placed, place, place_behind_arena

# Of the pool, what experts may take that are read though nobody waits for them; and never more than a layer's top-k.
_FILLING_SHARE = 8
# Routed slots per expert from which guesses pay in prefill: nearly every expert is used then, so few are wrong.
# Measured on two models: they lose up to 16, and win from 32 (benchmarks/prefill.py).
_PREFILL_GUESSES_FROM = {"on": 0.0, "auto": 24.0, "off": inf}
# Experts of this size take a millisecond to read: guesses were measured to pay. At 74 KB they lost (docs/LOG.md).
_LARGE_EXPERT_BYTES, _TRUSTED_STEPS = 2**20, 128
# Kernels that oneDNN keeps compiled, one for each shape. Prompts give an expert another number of rows each time: its
# own 1024 come to 400 MB in bf16, for 4 % of a prompt's time. Decoding has some dozens of shapes.
_KERNELS_KEPT = "128"


def load(
    path_or_hub_id: str | Path,
    memory: int | str | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    config: EngineConfig | None = None,
    device: str | None = None,
    revision: str | None = None,
    progress: Progress = lambda done, total: None,
    **model_kwargs: Any,
) -> Any:
    """Load a Mixture-of-Experts model whose experts stay on disk and visit memory as they are needed.

    With device "cuda" they stay in host memory, and on disk as far as that does not hold them, and visit the GPU's.

    Args:
        path_or_hub_id: folder of a Hugging Face checkpoint (safetensors), or `org/name`.
        memory: budget for experts: bytes, "8GiB", or "25%" of the expert bytes; chosen from free RAM, or from the
            GPU's free memory, when None.
        dtype: compute dtype; "auto" is the checkpoint's. Experts are kept as stored and converted when computed.
        config: the other switches; `memory` above and `device` win over its own.
        device: "cpu" or "cuda".
        progress: told how many of how many experts are in host memory, while it is filled.
        model_kwargs: passed on to transformers (attn_implementation, ...).
    Returns:
        An ordinary transformers model, ready for `generate`, with `model.foreroute` (plan, stats, close) added.
    Raises:
        ForerouteError: see errors.py; each names what is wrong and what to do.
    """
    # Read by oneDNN at its first product; what the user has set stays.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS_KEPT)
    asked = config or EngineConfig()
    asked = asked if device is None else replace(asked, device=device)
    target = open_device(asked)
    is_cuda = target.type == "cuda"
    policy = Policy.parse(asked.policy)
    trace = None if asked.trace is None else open_trace(asked.trace)
    folder = locate(path_or_hub_id, revision=revision)
    index = read_index(folder)
    sketch = outline(folder, index)
    asked_memory = memory if memory is not None else asked.memory
    store = open_store(folder, asked.packed, sketch.table)
    kept = sketch.table if store is None else store.table
    if is_cuda:
        check_store(store, STORED)
        check_room(target, asked, sketch.config, sketch.dense_nbytes)
    else:
        free_ram = available_ram()
        budget = choose_memory(asked_memory, kept, sketch.dense_nbytes, free_ram_bytes=free_ram)
        if asked.kv_tokens is not None and asked_memory is not None:
            # What keys and values take is not known yet; what cannot fit without them is not loaded first.
            whole = kept.total_slots * kept.slot_bytes
            check_serving(ServingNeeds(sketch.dense_nbytes, min(budget, whole), 0, 0, 0), free_ram, 0)
    sidecar = None if is_cuda or asked.control == "device" else open_sidecar(folder, index, asked)
    model: Any = load_skeleton(folder, sketch, _torch_dtype(dtype), **model_kwargs)
    layers = probe(model, offloaded_modules(model))
    check_layout(sidecar, layers, model.config.get_text_config().hidden_size)
    source = sketch.table.reordered([layer.name for layer in layers])
    table = kept.reordered([layer.name for layer in layers])
    if is_cuda:
        budget = move_and_choose(target, asked, asked_memory, model, layers, table)
        layers = on_device(layers, target)
    kv_bytes = None
    if asked.kv_tokens is not None and not is_cuda and asked.control != "device":
        kv_bytes = kv_bytes_without_experts(model, layers)
        arena = 0 if asked.host_memory is None else host_records(asked, free_ram, table) * table.slot_bytes
        budget = fit_serving(asked, asked_memory, budget, kv_bytes, free_ram, model, layers, table, arena)
    slots = plan_slots(budget, table.slot_bytes, table.total_slots, [layer.top_k for layer in layers])
    staging_slots = slots.staging_slots if asked.prefetch != "none" or policy.stands_in else 0
    math = math_of_layers(layers, source, store, model.dtype)
    is_paged = asked.control == "device"
    is_learning = sidecar is None and staging_slots > 0 and not is_cuda and not is_paged
    learner = _make_learner(asked, layers, model, budget) if is_learning else None
    predictor = prefetch_guesses(asked, layers, model.dtype, sidecar, learner)
    policies = approximation(
        layers, model.dtype, sidecar, asked, predictor, own_math=all(entry is not None for entry in math)
    )
    policies.set([policy])
    has_arena = is_cuda or is_paged or asked.host_memory is not None
    num_records = host_records(asked, available_ram(), table) if has_arena else 0
    if is_paged:
        tier = build_tier(asked, layers, table, store, slots, math, model.dtype, target, policies, progress)
        # Where a model meets its engine the two are alike; what only one of them has is refused in open_device.
        runtime = cast(Runtime, tier)
    else:
        placed = (
            place_behind_arena(
                asked, table, store, slots.num_slots, trace, device=target, num_records=num_records, progress=progress
            )
            if has_arena
            else place(asked, table, store, slots.num_slots, trace)
        )
        runtime = _build_runtime(
            asked, layers, table, placed, slots.num_slots, staging_slots, math, model.dtype, predictor, policies
        )
        runtime.learner = learner
    plan = Plan(
        folder=str(folder),
        model_type=sketch.config.model_type,
        num_layers=len(layers),
        num_experts=table.num_experts,
        top_k=tuple(layer.top_k for layer in layers),
        expert_bytes=max(layer.expert_nbytes for layer in table.layers),
        total_expert_bytes=table.expert_nbytes,
        dense_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        memory_bytes=budget,
        memory_was_chosen=asked_memory is None,
        slot_bytes=table.slot_bytes,
        num_slots=slots.num_slots,
        total_slots=table.total_slots,
        token_demand_slots=slots.token_demand_slots,
        staging_slots=staging_slots,
        source=index.kind if store is None else "packed",
        stored_dtype=_stored_dtype(source) if store is None or store.codec == STORED else store.codec,
        compute_dtype=str(model.dtype).removeprefix("torch."),
        predictor=asked.prefetch if sidecar is None else "fitted",
        math="own" if all(entry is not None for entry in math) else "family",
        prefill_chunk=asked.prefill_chunk,
        device=str(target),
        host_records=num_records,
        kv_tokens=asked.kv_tokens or (DEVICE_KV_TOKENS if is_cuda or is_paged else 0),
        kv_bytes_per_token=kv_bytes,
        learning_bytes=0 if learner is None else learning_limit(budget),
    )
    if trace is not None:
        trace.begin(**header_of(plan, asked, table, index.fingerprint()))
        runtime.tracing = StepTrace(trace, table.num_experts)
    for layer in layers:
        layer.experts.engine_forward = _computing(runtime, layer.index)
    return make_offloaded(model, ForerouteHandle(plan, runtime, layers))


def _make_learner(asked: EngineConfig, layers: list[MoeLayer], model: Any, budget: int) -> Learner | None:
    """Learning beside the budget: bounded by a share of it, and off where not even a layer fits that."""
    if not asked.learn or asked.prefetch == "none" or asked.deterministic:
        return None
    hidden = model.config.get_text_config().hidden_size
    learner = Learner(layers, hidden, model.dtype, lookahead(layers, model.dtype), learning_limit(budget))
    return learner if learner.is_learning else None


def _torch_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise ForerouteError(f"dtype {dtype!r} is not known. Choose auto, {', '.join(known)}.")
    return known[dtype]


def _stored_dtype(source: ExpertTable) -> str:
    return source.stored_as or source.layers[0].layout.parts[0].dtype


def _build_runtime(
    asked: EngineConfig,
    layers: list[MoeLayer],
    table: ExpertTable,
    placed: Placed,
    num_slots: int,
    staging_slots: int,
    math: list[ExpertMath | None],
    dtype: torch.dtype,
    predictor: Predictor | None,
    policies: Approximation,
) -> Runtime:
    residency = Residency(
        num_slots,
        table.num_keys,
        eviction=eviction_of(asked.eviction, table.num_experts),
        staging_slots=staging_slots,
        filling_slots=min(max(layer.top_k for layer in layers), num_slots // _FILLING_SHARE),
        keys_per_layer=table.num_experts,
    )
    device = placed.memory.device if isinstance(placed.memory, torch.Tensor) else torch.device("cpu")
    return Runtime(
        table,
        residency,
        placed.transfer,
        SlotViews(
            placed.memory,
            table.slot_bytes,
            [layer.layout for layer in table.layers],
            stored_operands(math, table, dtype),
            dtype,
            [layer.other for layer in table.layers],
        ),
        math,
        family_forward_over(layers, table, dtype),
        _workspaces(layers, table, math, dtype, device),
        predictor,
        free_slots=placed.free,
        hits_first=asked.hits_first,
        keep_across_tokens=asked.cache,
        prefill_guesses_from=inf if asked.deterministic else _PREFILL_GUESSES_FROM[asked.prefetch_prefill],
        approximation=policies,
        governor=_governor(asked, table) if predictor is not None else None,
    )


def _governor(asked: EngineConfig, table: ExpertTable) -> Governor | None:
    """Where guesses only fetch early, and nobody has said how many they shall be, what they gain decides.

    Under other policies guesses decide what is there, and so the output: they are not for the clock to switch.
    """
    is_exact = not Policy.parse(asked.policy).stands_in and not Policy.parse(asked.policy).replaces_route
    if not asked.governor or asked.prefetch_width is not None or not is_exact or asked.deterministic:
        return None
    is_large = max(layer.layout.nbytes for layer in table.layers) >= _LARGE_EXPERT_BYTES
    return Governor(trusted_steps=_TRUSTED_STEPS if is_large else 0)


def _workspaces(
    layers: list[MoeLayer],
    table: ExpertTable,
    math: list[ExpertMath | None],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Workspace | None]:
    shared: dict[tuple[int, int, int], Workspace] = {}
    workspaces: list[Workspace | None] = []
    for layer, described, entry in zip(layers, table.layers, math, strict=True):
        if entry is None:
            workspaces.append(None)
            continue
        shape = (layer.top_k, *entry.widths([part.shape for part in described.layout.parts]))
        if shape not in shared:
            is_quantised = isinstance(entry, QuantisedMath)
            shared[shape] = QuantisedToken(layer.top_k) if is_quantised else OneToken(*shape, dtype, device)
        workspaces.append(shared[shape])
    return workspaces


def _computing(runtime: Runtime, layer: int) -> Callable[..., torch.Tensor]:
    def forward(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return runtime.compute(layer, hidden, ids, weights)

    return forward
