"""The composition root: from a path and a budget to a transformers model whose experts are loaded when needed.

All errors are found before the first expert is read, in this order: the arguments, the checkpoint's headers, memory for
it, the model, the division of memory.
"""

import os
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import __version__ as _TRANSFORMERS

from foreroute.checkpoint.codecs import orders_of
from foreroute.config import EngineConfig, Plan
from foreroute.engine.moe_step import MoeStep
from foreroute.engine.step_trace import StepTrace, header_of
from foreroute.errors import UnsupportedModelError
from foreroute.loading.arguments import open_device, read_arguments
from foreroute.loading.block_kernels import DECODE_THREADS, note_of, open_block_kernels
from foreroute.loading.checkpoint import Checkpoint, find_experts, open_checkpoint
from foreroute.loading.engines import guidance_for, has_one_slot_length, start_engine
from foreroute.loading.offloaded_model import ForerouteHandle, OffloadedModel, make_offloaded
from foreroute.loading.progress import LoadedBytes
from foreroute.loading.step_entry import Bounds, StepEntry
from foreroute.loading.wording import in_callers_words
from foreroute.memory.host import cpu_name, usable_cpus
from foreroute.memory.plan import MemoryPlan, check_before, move_dense, plan_memory
from foreroute.memory.serving import draft_bytes_per_token
from foreroute.model import torch_modes
from foreroute.model.blocks import first_decoded
from foreroute.model.build.dense_blocks import dense_nbytes
from foreroute.model.build.skeleton import load_skeleton
from foreroute.model.build.stored_names import tell
from foreroute.model.draft_model import PROMPT_LOOKUP, DraftFiles, DraftModel, find_draft
from foreroute.model.expert_set import ExpertSet
from foreroute.model.generation_settings import complete_generation_config
from foreroute.policy import Policy
from foreroute.predict.build import open_sidecar
from foreroute.predict.sidecar import Sidecar
from foreroute.trace import open_trace
from foreroute.types import Progress
from foreroute.units import kept_bytes

# Kernels that oneDNN keeps compiled, one for each shape. Prompts give an expert another number of rows each time: its
# own 1024 come to 400 MB in bf16, for 4 % of a prompt's time. Decoding has some dozens of shapes.
_KERNELS_KEPT = "128"


@in_callers_words
@torch_modes.as_if_alone()
def load(
    path_or_hub_id: str | Path,
    memory: int | str | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    config: EngineConfig | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    progress: Progress = lambda done, total: None,
    **model_kwargs: Any,
) -> OffloadedModel:
    """Load a Mixture-of-Experts model whose experts stay on disk and are loaded into memory when needed.

    With device "cuda" they stay in host memory, those that do not fit on disk, and are loaded into the GPU's memory.

    Args:
        path_or_hub_id: folder of a Hugging Face checkpoint (safetensors), a GGUF file, or a hub id: `org/name`, or
            `org/name:Q4_K_M` of GGUF files. revision: of a hub id.
        memory: budget for experts: bytes, "8GiB", or "25%" of the expert bytes; chosen from free RAM, or from the
            GPU's free memory, when None.
        dtype: compute dtype; "auto" is the checkpoint's. Experts are kept as stored and converted when computed.
        config: the other switches; `memory` above and `device` win over its own.
        device: "cpu" or "cuda", or a torch.device of that kind.
        progress: called with (bytes read, bytes to read): of dense weights, then of the experts that host memory is
            filled with, which join the second figure then. By any thread, one at a time.
        model_kwargs: attn_implementation, for transformers; token, local_files_only and cache_dir, for a hub id;
            torch_dtype, which is dtype. Others are refused by name (loading/arguments.py).
    Returns:
        An ordinary transformers model, ready for `generate`, with `model.foreroute` (plan, stats, tokenizer, close)
        added. `with load(...) as model:` closes it at the end.
    Raises:
        ForerouteError: see errors.py; each names what is wrong and what to do.
    """
    # Read by oneDNN at its first product; the user's own value stays.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS_KEPT)
    call = read_arguments(path_or_hub_id, memory, dtype, config, device, revision, progress, model_kwargs)
    asked = call.config
    Policy.parse(asked.policy)  # refused here where it is none, before anything is read
    target = open_device(asked)
    trace = None if asked.trace is None else open_trace(asked.trace)
    checkpoint = open_checkpoint(path_or_hub_id, revision, asked.packed, call.hub)
    checkpoint = replace(checkpoint, has_one_slot_length=has_one_slot_length(asked, target))
    sketch = checkpoint.outline
    kernels, why_torch = open_block_kernels(asked, checkpoint, target)
    if kernels is not None:
        checkpoint = checkpoint.in_blocks()
    dense_before = sketch.dense_nbytes if kernels is None else kernels.dense_nbytes(sketch)
    draft_files = _draft_files(asked, checkpoint)
    before = check_before(
        asked, target, checkpoint.kept, checkpoint.store, sketch.config, dense_before, _nbytes(draft_files)
    )
    sidecar = _sidecar(asked, target, checkpoint)
    dtype, blocks = (call.dtype, None) if kernels is None else kernels.dense_blocks(sketch, call.dtype)
    counted = LoadedBytes(progress, dense_before)
    counted.watch(blocks)
    model = load_skeleton(
        checkpoint.folder, sketch, dtype, blocks, checkpoint.store, noted=counted.dense, **call.model_kwargs
    )
    counted.end_dense()
    complete_generation_config(model, checkpoint.folder, checkpoint.index)
    experts = find_experts(model, checkpoint, None if kernels is None else kernels.runner.library)
    math_note = note_of(asked, why_torch or experts.no_form)
    tell((math_note,) if math_note else (), checkpoint.folder)
    if kernels is not None:
        kernels.quicken(model)
    draft, draft_bytes = _draft(asked, draft_files)
    division = plan_memory(asked, target, model, experts, before, draft_bytes)
    if target.type == "cuda":
        move_dense(model, target)
        experts = experts.on(target)
    guidance = guidance_for(asked, model, experts, sidecar)
    engine = start_engine(asked, experts, division, guidance, trace, counted.experts(experts.table.slot_bytes))
    plan = _plan(asked, target, model, checkpoint, experts, division, is_fitted=sidecar is not None)
    identity = "" if asked.prefix_cache_dir is None else _identity(checkpoint, plan, model)
    plan = replace(plan, math_note=math_note, identity=identity)
    plan = replace(
        plan, draft=str(asked.draft or ""), draft_bytes=_nbytes(draft_files), draft_bytes_per_token=draft_bytes
    )
    if trace is not None:
        trace.begin(**header_of(plan, asked, experts.table, checkpoint.index.fingerprint()))
        assert isinstance(engine, MoeStep), "no trace is written where the device pages for itself: see open_device"
        engine.pool.add_observer(StepTrace(trace, experts.table.keys))
    if kernels is not None:
        kernels.keep_rows_alike(model, engine, experts.layers)
    decode_threads = None if kernels is None else DECODE_THREADS
    entry = StepEntry(engine, len(experts.layers), Bounds.of(model), target, decode_threads)
    for layer in experts.layers:
        layer.experts.engine_forward = partial(entry.compute, layer.index)
    handle = ForerouteHandle(plan, engine, list(experts.layers), experts.table, entry)
    handle.draft = draft
    return make_offloaded(model, handle)


def _draft_files(asked: EngineConfig, checkpoint: Checkpoint) -> DraftFiles | None:
    """The checked checkpoint of a draft; None where none is asked for, or none is needed.

    Raises:
        UnsupportedModelError, CheckpointError: nothing can be drafted for this model, or not by that one.
    """
    if asked.draft is not None and getattr(checkpoint.outline.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"--draft: {checkpoint.folder} is an encoder-decoder, for which nothing is drafted yet. Leave it out."
        )
    if asked.draft is None or asked.draft == PROMPT_LOOKUP:
        return None
    return find_draft(asked.draft, checkpoint.folder, checkpoint.index)


def _nbytes(draft_files: DraftFiles | None) -> int:
    return 0 if draft_files is None else draft_files.nbytes


def _draft(asked: EngineConfig, draft_files: DraftFiles | None) -> tuple[DraftModel | str | None, int]:
    """What drafts tokens: a loaded model, PROMPT_LOOKUP, or nothing; and the bytes of a token in its own cache."""
    if draft_files is None:
        return asked.draft, 0
    draft = draft_files.load()
    return draft, draft_bytes_per_token(draft.model)


def _identity(checkpoint: Checkpoint, plan: Plan, model: PreTrainedModel) -> str:
    """What the bits of keys and values depend on: weights as they are computed, in which chunks, and by what."""
    store = "" if checkpoint.store is None else checkpoint.store.digest
    numbers = (plan.compute_dtype, plan.math, plan.dense, plan.layout, plan.device, plan.threads, plan.prefill_chunk)
    attention = model.config.get_text_config()._attn_implementation
    # torch and our kernels choose their code by what the processor has.
    processor = (torch.backends.cpu.get_cpu_capability(), cpu_name())
    versions = (import_module("foreroute").__version__, torch.__version__, _TRANSFORMERS)
    return "|".join(map(str, (checkpoint.index.fingerprint(), store, *numbers, attention, *processor, *versions)))


def _sidecar(asked: EngineConfig, target: torch.device, checkpoint: Checkpoint) -> Sidecar | None:
    """Find the fitted predictors; none on a GPU yet."""
    if target.type == "cuda" or asked.control == "device":
        return None
    return open_sidecar(checkpoint.folder, checkpoint.index, asked)


def _plan(
    asked: EngineConfig,
    target: torch.device,
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    experts: ExpertSet,
    memory: MemoryPlan,
    *,
    is_fitted: bool,
) -> Plan:
    """Describe what was decided, for people and programs."""
    table = experts.table
    return Plan(
        folder=str(checkpoint.folder),
        model_type=checkpoint.outline.config.model_type,
        num_layers=len(experts.layers),
        num_experts=table.num_experts,
        top_k=experts.top_k,
        expert_bytes=experts.expert_bytes,
        total_expert_bytes=table.expert_nbytes,
        dense_bytes=dense_nbytes(model),
        memory_bytes=memory.budget_bytes,
        memory_was_chosen=asked.memory is None,
        slot_classes=tuple((one.slot_bytes, one.num_slots) for one in memory.slots.classes),
        slot_bytes=table.slot_bytes,
        num_slots=memory.slots.num_slots,
        token_slot_bytes=memory.slots.token_bytes,
        all_slot_bytes=table.whole_bytes,
        total_slots=table.total_slots,
        token_demand_slots=sum(experts.top_k[first_decoded(experts.layers) :]) or memory.slots.token_demand_slots,
        staging_slots=memory.staging_slots,
        source=checkpoint.index.kind if checkpoint.store is None else "packed",
        stored_dtype=checkpoint.stored_dtype,
        compute_dtype=str(model.dtype).removeprefix("torch."),
        predictor="fitted" if is_fitted else asked.prefetch,
        math=experts.math_name,
        prefill_chunk=asked.prefill_chunk,
        device=str(target),
        host_records=memory.host_records,
        kv_tokens=memory.kv_tokens,
        kv_bytes_per_token=memory.kv_bytes_per_token,
        prefix_cache=kept_bytes(asked.prefix_cache),
        threads=torch.get_num_threads(),
        usable_cpus=usable_cpus(),
        layout="interleaved" if orders_of(table) else "plain",
        num_parameters=checkpoint.outline.num_parameters,
        num_embeddings=checkpoint.outline.num_embeddings,
        dense=checkpoint.packed_dense.lower() or asked.dense,
    )
