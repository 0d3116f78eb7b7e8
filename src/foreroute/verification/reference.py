"""Record what exact mode is compared with: the resident model, or on-demand loading where RAM is too small.

The resident model is transformers' where torch multiplies, and where ggml does one with the same kernels and every
expert in memory. A reference is run once and freed. Only hashes are kept: of every step, expert and dense tensor.
"""

import contextlib
import copy
import gc
import importlib.util
import inspect
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from foreroute.checkpoint.codecs import STORED
from foreroute.checkpoint.index import CheckpointIndex
from foreroute.checkpoint.layouts import PART_ALIGNMENT, ExpertTable
from foreroute.checkpoint.quantised_formats import FP8, MXFP4
from foreroute.checkpoint.records import open_store
from foreroute.checkpoint.source_files import room_for_files
from foreroute.config import EngineConfig, Plan
from foreroute.errors import BudgetError, CheckpointError, ForerouteError, UnsupportedModelError
from foreroute.loading.load import load
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.memory.host import available_ram
from foreroute.model.adapters.registry import adapter_of
from foreroute.model.adapters.resident import ResidentBlock
from foreroute.model.build.dense_blocks import dense_weights
from foreroute.model.build.skeleton import Outline, auto_class
from foreroute.types import Progress
from foreroute.units import format_memory
from foreroute.verification.fresh_records import is_made_by_pack, other_dense, other_records
from foreroute.verification.slot_watch import SlotWatch, digest, expert_digest
from foreroute.verification.transcript import Exercise, ForwardPass, steps

RESIDENT, ON_DEMAND = "resident", "on-demand"
# RAM left free beside a resident model: activations, KV cache, overhead of loading, other programs.
_RESERVE_BYTES = 2 * 2**30
_PLAIN_LOADING = EngineConfig(prefetch="none", predictor="no", packed="no", math="torch")
# The hash of an expert or a dense weight that no bytes can equal.
_NO_DIGEST = b""
# As in Plan.math, and in Plan.dense.
GGML, AS_STORED = "ggml", "stored"


@dataclass(frozen=True)
class Reference:
    """Hashes of one model's run.

    kind: RESIDENT or ON_DEMAND. dtype: the compute dtype.
    transcripts: per prompt its steps, prefill first.
    experts: (experts module, expert) -> hash of its parts; only of those that were used unless has_all_experts.
    dense: weight or buffer -> hash. is_of_store: the transcripts are of a packed store's weights, which have yet to be
        compared with `experts` and `dense`.
    """

    kind: str
    has_all_experts: bool
    dtype: torch.dtype
    transcripts: tuple[tuple[ForwardPass, ...], ...]
    experts: Mapping[tuple[str, int], bytes]
    dense: Mapping[str, bytes]
    is_of_store: bool = False

    @property
    def tokens(self) -> list[list[int]]:
        """Per prompt the token that each step chose."""
        return [[step.token for step in transcript] for transcript in self.transcripts]

    @property
    def num_steps(self) -> int:
        """Forward passes over all prompts; each chooses one token."""
        return sum(len(transcript) for transcript in self.transcripts)


def choose_reference(asked: str, index: CheckpointIndex, sketch: Outline, dtype: str, plan: Plan) -> str:
    """Choose RESIDENT where the model (`sketch`) fits the free RAM beside a reserve, else ON_DEMAND; or as `asked`.

    Args:
        asked: "auto", RESIDENT or ON_DEMAND. index: of the checkpoint.
        dtype: the compute dtype's name, or "auto". plan: of the model that is verified.
    Raises:
        BudgetError: RESIDENT was asked for and cannot fit.
        UnsupportedModelError: RESIDENT was asked for, and transformers' own model cannot be compared here.
    """
    if plan.math == GGML or plan.dense != AS_STORED:
        return _by_room(asked, plan.dense_bytes + plan.total_expert_bytes)
    if index.kind == "gguf" and asked == RESIDENT:
        raise ForerouteError("transformers has no resident model of a GGUF file's bits. Take --reference on-demand.")
    if asked == ON_DEMAND or index.kind == "gguf":
        return ON_DEMAND
    hindrance = _not_resident(index, sketch)
    if hindrance and asked == RESIDENT:
        raise UnsupportedModelError(f"No resident model of {index.folder}: {hindrance}. Take --reference on-demand.")
    if hindrance:
        return ON_DEMAND
    return _by_room(asked, resident_bytes(index, sketch, dtype))


def _by_room(asked: str, wanted: int) -> str:
    """RESIDENT where a model of `wanted` bytes fits or was asked for, else ON_DEMAND."""
    if asked == ON_DEMAND:
        return ON_DEMAND
    free = available_ram()
    if asked == RESIDENT and wanted > free:
        raise BudgetError(
            f"The resident model needs {format_memory(wanted, round_up=True)}; {format_memory(free)} of RAM is free. "
            "Take --reference on-demand."
        )
    return RESIDENT if asked == RESIDENT or wanted + _RESERVE_BYTES <= free else ON_DEMAND


def resident_bytes(index: CheckpointIndex, sketch: Outline, dtype: str) -> int:
    """Bytes of all tensors of the checkpoint (`index`, outlined by `sketch`) in the compute dtype."""
    compute = sketch.config.dtype if dtype == "auto" else getattr(torch, dtype)
    if not isinstance(compute, torch.dtype):
        return index.nbytes
    # Quantised experts count dequantised; one stored element holds several numbers, or none.
    quantised = [layer for layer in sketch.table.layers if layer.parts]
    stored = {name for layer in quantised for source in layer.sources for group in source.groups for name in group}
    numbers = sum(
        layer.num_experts * math.prod(part.shape) for layer in quantised for part in layer.family_layout.parts
    )
    numbers += sum(math.prod(entry.shape) for name, entry in index.tensors.items() if name not in stored)
    return numbers * compute.itemsize


def _not_resident(index: CheckpointIndex, sketch: Outline) -> str:
    """Why transformers' resident model cannot be the reference on this machine; "" where it can."""
    for cls in sketch.experts_classes:
        adapter = adapter_of(cls)
        if adapter is not None and adapter.NOTE:
            return adapter.NOTE.rstrip(".")
    if sketch.form is None or sketch.form.coding.kind == MXFP4:
        return ""
    if sketch.form.coding.kind != FP8:
        return f"transformers has no dequantiser of {sketch.form.name} experts that runs here"
    if importlib.util.find_spec("accelerate") is None:
        return "transformers dequantises FP8 only where accelerate is installed (`pip install accelerate`)"
    for values, _ in sketch.matrices.values():
        shape, block = index.tensors[values].shape[-2:], sketch.form.coding.block
        if any(extent > part and extent % part for extent, part in zip(shape, block, strict=True)):
            return f"transformers does not dequantise {values}, whose last blocks are cut off"
    return ""


def record_reference(
    kind: str,
    folder: Path,
    sketch: Outline,
    dtype: str,
    plan: Plan,
    exercises: Sequence[Exercise],
    progress: Progress,
    config: EngineConfig = _PLAIN_LOADING,
) -> Reference:
    """Load the reference from `folder`, let it continue each of `exercises` greedily, and free it.

    On-demand loading (`kind`) evicts every expert after its layer, prefetches nothing, and reads the checkpoint's own
    files as transformers chooses them, from a folder without any others, so that a different choice of ours shows. So
    does the resident model that has ggml's kernels.

    Products of rows that lie side by side have other last bits than those of the checkpoint's rows. Where a store has
    such rows, the steps are those of a second model, which reads that store; the experts' hashes stay the checkpoint's.
    Where the checkpoint has no blocks and `pack` made the store's, of experts or of dense weights, there is that second
    model alone, and each record that it used is compared with what packing the checkpoint anew makes.

    Args:
        sketch: the model's outline. dtype: compute dtype. progress: (done, all).
        plan: of the model that is verified: its budget is that of on-demand loading, its kernels are the reference's.
        config: of that model.
    Raises:
        ForerouteError: its logits are NaN, so that a comparison would mean nothing.
    """
    try:
        if is_of_made_blocks(sketch, plan):
            stored = _recorded_of_store(kind, folder, sketch, dtype, plan, exercises, progress, config)
            return _as_packed_anew(stored, folder, sketch, config.packed)
        with _reference_model(kind, folder, sketch, dtype, plan) as model:
            reference = _recorded(kind, model, sketch, exercises, progress)
        if plan.math != GGML or plan.layout == "plain":
            return reference
        gc.collect()
        stored = _recorded_of_store(kind, folder, sketch, dtype, plan, exercises, progress, config)
        return replace(stored, experts=reference.experts, is_of_store=True)
    finally:
        gc.collect()


def is_of_made_blocks(sketch: Outline, plan: Plan) -> bool:
    """Whether a packed store's blocks are computed that `pack` made, of a checkpoint that has none."""
    of_experts = plan.math == GGML and is_made_by_pack(sketch.table)
    return plan.source == "packed" and (of_experts or plan.dense != AS_STORED)


def _recorded_of_store(
    kind: str, folder: Path, sketch: Outline, dtype: str, plan: Plan, exercises: Sequence[Exercise],
    progress: Progress, config: EngineConfig,
) -> Reference:  # fmt: skip
    chosen = replace(_config(kind, plan), packed=config.packed)
    if plan.math != GGML:  # of dense blocks alone
        chosen = replace(chosen, math=config.math)
    model = load(folder, *_asked(kind, plan, dtype), config=chosen)
    with contextlib.closing(model.foreroute):
        return _recorded(kind, model, sketch, exercises, progress)


def _as_packed_anew(stored: Reference, folder: Path, sketch: Outline, packed: str) -> Reference:
    """The run of a store, with the hashes of those weights alone that are what packing the checkpoint makes."""
    table, store = sketch.table, open_store(folder, packed, sketch.table)
    assert store is not None, "its experts were read"
    at = {layer.name: place for place, layer in enumerate(table.layers)}
    keys = {table.keys.key(at[name], expert): (name, expert) for name, expert in stored.experts}
    others = dict.fromkeys((keys[key] for key in other_records(store, table, keys)), _NO_DIGEST)
    dense = dict.fromkeys(other_dense(store, sketch), _NO_DIGEST)
    return replace(stored, experts={**stored.experts, **others}, dense={**stored.dense, **dense}, is_of_store=True)


def _asked(kind: str, plan: Plan, dtype: str) -> tuple[int | str, str]:
    """Budget and compute dtype of a reference of ours."""
    return "100%" if kind == RESIDENT else plan.memory_bytes, dtype


def _config(kind: str, plan: Plan) -> EngineConfig:
    return replace(_PLAIN_LOADING, cache=kind == RESIDENT, math=GGML if plan.math == GGML else "torch")


@contextlib.contextmanager
def _reference_model(kind: str, folder: Path, sketch: Outline, dtype: str, plan: Plan) -> Iterator[PreTrainedModel]:
    if kind == RESIDENT and plan.math != GGML:
        yield _load_resident(folder, sketch, dtype)
        return
    with _opened(folder, sketch, *_asked(kind, plan, dtype), _config(kind, plan)) as model:
        yield model


@contextlib.contextmanager
def torch_model(folder: Path, sketch: Outline, plan: Plan, packed: str = "no") -> Iterator[OffloadedModel]:
    """Yield the model of `folder` whose blocks torch dequantises; in the memory and the compute dtype of `plan`.

    Args:
        packed: as in the configuration of the model that is verified; only what `pack` quantised is read there. Blocks
            that hold a checkpoint's own numbers exactly are compared with these.
    """
    store = open_store(folder, packed, sketch.table) if is_of_made_blocks(sketch, plan) else None
    if store is not None and (store.codec != STORED or store.dense.kind):
        model = load(folder, plan.memory_bytes, plan.compute_dtype, config=replace(_PLAIN_LOADING, packed=packed))
        with contextlib.closing(model.foreroute):
            yield model
        return
    with _opened(folder, sketch, plan.memory_bytes, plan.compute_dtype, _PLAIN_LOADING) as model:
        yield model


@contextlib.contextmanager
def _opened(
    folder: Path, sketch: Outline, memory: int | str, dtype: str, config: EngineConfig
) -> Iterator[OffloadedModel]:
    """Yield a model of the files that transformers chooses in `folder`; close it afterwards."""
    with chosen_by_transformers(folder, sketch) as only:
        model = load(only, memory, dtype, config=config)
        with contextlib.closing(model.foreroute):
            yield model


def _recorded(
    kind: str, model: PreTrainedModel, sketch: Outline, exercises: Sequence[Exercise], progress: Progress
) -> Reference:
    names = [layer.name for layer in sketch.table.layers]
    watch = SlotWatch(model.foreroute.host_engine) if isinstance(model, OffloadedModel) else None
    transcripts: list[tuple[ForwardPass, ...]] = []
    done, num_steps = 0, sum(exercise.num_steps for exercise in exercises)
    for exercise in exercises:
        transcript: list[ForwardPass] = []
        for step in steps(model, names, exercise, watch=watch):
            _check_numbers(step, len(transcripts) + 1, len(transcript) + 1)
            # A reference's slots are not needed afterwards.
            transcript.append(step._replace(layers=tuple(layer._replace(uses=()) for layer in step.layers)))
            done += 1
            progress(done, num_steps)
        transcripts.append(tuple(transcript))
    experts = _resident_experts(model, sketch.table) if watch is None else _seen_experts(watch, model.foreroute.table)
    dense = dense_digests(model, sketch.expert_targets)
    return Reference(kind, watch is None, model.dtype, tuple(transcripts), experts, dense)


def dense_digests(model: PreTrainedModel, expert_targets: frozenset[str] = frozenset()) -> dict[str, bytes]:
    """Hash every dense weight and buffer of `model`, by name; its parameters without the experts (expert_targets)."""
    tensors = [*dense_weights(model), *model.named_buffers()]
    return {name: digest([tensor]) for name, tensor in tensors if name not in expert_targets}


@contextlib.contextmanager
def chosen_by_transformers(folder: Path, sketch: Outline) -> Iterator[Path]:
    """Yield a folder of links to the weight files that transformers resolves for `folder`, and to all other files.

    A GGUF file, as `sketch` tells, is a single file and yielded as it is.

    Raises:
        CheckpointError: transformers finds no weights there.
    """
    if not folder.is_dir():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="foreroute-") as scratch:
        for name in (*_weights_of(folder, sketch), *_no_weights(folder)):
            link = Path(scratch, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((folder / name).absolute())
        yield Path(scratch)


def _weights_of(folder: Path, sketch: Outline) -> list[str]:
    """List the files that transformers itself would load, relative to `folder`, with the index."""
    from transformers import modeling_utils

    resolve = modeling_utils._get_resolved_checkpoint_files
    named = getattr(sketch.config, "transformers_weights", None)
    asked = {
        "pretrained_model_name_or_path": str(folder), "variant": None, "gguf_file": None, "use_safetensors": True,
        "user_agent": None, "is_remote_code": False, "transformers_explicit_filename": named,
    }  # fmt: skip
    try:
        # The required arguments differ between versions of transformers.
        known = inspect.signature(resolve).parameters
        files, sharded = resolve(**{name: value for name, value in asked.items() if name in known})
    except OSError as error:
        raise CheckpointError(f"transformers finds no weights in {folder}: {error}") from error
    index = [named or modeling_utils.SAFE_WEIGHTS_INDEX_NAME] if sharded is not None else []
    return [*index, *(str(Path(file).relative_to(folder)) for file in files)]


def _no_weights(folder: Path) -> list[str]:
    return [
        path.name
        for path in folder.iterdir()
        if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json", ".foreroute"))
    ]


def _load_resident(folder: Path, sketch: Outline, dtype: str) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    room_for_files(len(sketch.table.index.files))  # transformers opens all at once
    compute = dtype if dtype == "auto" else getattr(torch, dtype)
    # Where only the KV cache is quantised, transformers must see an unquantised model, as `load` does.
    config = None if sketch.form is not None else copy.deepcopy(sketch.config)
    model = auto_class(folder, sketch.config).from_pretrained(
        folder, config=config, dtype=compute, experts_implementation="eager", use_safetensors=True
    )
    for name, parameter in model.named_parameters():
        # Experts stored as one tensor lie in the mapped file, where products may round otherwise than aligned ones.
        if name in sketch.expert_targets and parameter.data_ptr() % PART_ALIGNMENT:
            parameter.data = parameter.data.clone()
    return model.eval()


def _resident_experts(model: PreTrainedModel, table: ExpertTable) -> dict[tuple[str, int], bytes]:
    """Hash every expert as transformers has assembled it."""
    digests = {}
    for layer in table.layers:
        block = ResidentBlock.of(model, layer.name)
        if block is not None:
            for expert in range(layer.num_experts):
                digests[layer.name, expert] = expert_digest(block.parts(expert))
            continue
        module = model.get_submodule(layer.name)
        parts = [getattr(module, part.name).detach() for part in layer.family_layout.parts]
        for expert in range(layer.num_experts):
            digests[layer.name, expert] = expert_digest(part[expert] for part in parts)
    return digests


def _seen_experts(watch: SlotWatch, table: ExpertTable) -> dict[tuple[str, int], bytes]:
    """Hash every expert that was used."""
    digests = {}
    for key, seen in watch.digests.items():
        layer, expert = table.expert_id(key)
        digests[table.layers[layer].name, expert] = seen
    return digests


def _check_numbers(step: ForwardPass, prompt: int, token: int) -> None:
    if step.has_nan:
        raise ForerouteError(
            f"The reference's logits for token {token} after prompt {prompt} are not numbers (NaN): comparing them "
            "proves nothing. Take another --dtype, or check the checkpoint."
        )
