"""Build a transformers model without its experts, and map its experts to the checkpoint's bytes.

While `from_pretrained` runs, each experts class is replaced in its own modeling module by a subclass that allocates
nothing; afterwards, also after a failure, the module is restored. transformers loads the rest as always. Names are
translated by transformers' own renaming functions, so that no family needs a table here.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from foreroute.checkpoint.gguf_file import GgufIndex, is_gguf
from foreroute.checkpoint.index import CheckpointIndex
from foreroute.checkpoint.layouts import ExpertTable, LayerExperts, PartSource
from foreroute.checkpoint.quantised_formats import QuantisedFormat
from foreroute.checkpoint.quantised_layout import quantised_layer
from foreroute.checkpoint.records import PackedStore
from foreroute.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError, named
from foreroute.model.adapters.registry import REFUSED, FoundExperts, adapter_of, find_experts, without_experts
from foreroute.model.build.dense_blocks import DenseBlocks, DenseMatrices, dense_matrices
from foreroute.model.build.dense_state import dense_growth, dense_state, idle_biases, quantised_matrices
from foreroute.model.build.from_state import from_state, stored_state
from foreroute.model.build.packed_dense import packed_state
from foreroute.model.build.stored_names import Ignored, map_sources, sort_unplaced, tell
from foreroute.model.config_file import check_against, check_choice, check_number, gguf_config, read_config
from foreroute.model.experts import ExpertParameter, OffloadedExperts
from foreroute.model.generation_settings import check_generation_settings
from foreroute.model.gguf.tensors import GgufNames, gguf_dense_nbytes, gguf_layer, gguf_state, name_tensors

# The swap replaces a name in a module shared by all threads: one load at a time.
_SWAP_LOCK = threading.RLock()


@dataclass(frozen=True)
class Outline:
    """Facts about a model before any weight is read.

    config: transformers' config.
    experts: names of the experts modules, in module order.
    table: where every expert's bytes are; layers in the order of `experts`.
    expert_targets: the fused parameters that must not be loaded, by full name.
    form: the format of quantised weights, or None. matrices, components: stored names of its quantised matrices, as
        in QuantisedFormat.split.
    ignored: stored tensors that are not read. linear: the dense matrices of safetensors that can be kept in blocks.
    gguf: the dense tensors of a GGUF file.
    num_parameters: numbers in all weights, experts too. num_embeddings: of them, those of embedding tables.
    """

    config: Any
    experts: tuple[str, ...]
    table: ExpertTable
    expert_targets: frozenset[str]
    experts_classes: frozenset[type[nn.Module]]
    form: QuantisedFormat | None = None
    matrices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    components: frozenset[str] = frozenset()
    ignored: Ignored = field(default_factory=Ignored)
    linear: DenseMatrices = field(default_factory=DenseMatrices)
    gguf: GgufNames | None = None
    num_parameters: int = 0
    num_embeddings: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Declared settings of the checkpoint that are ignored here, a line each."""
        gguf = () if self.gguf is None else self.gguf.notes
        adapters = {adapter for cls in self.experts_classes if (adapter := adapter_of(cls)) is not None}
        of_adapters = sorted(adapter.NOTE for adapter in adapters if adapter.NOTE)
        return (*(() if self.form is None else self.form.notes), *self.ignored.notes, *gguf, *of_adapters)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the non-expert weights will take: as stored, or dequantised."""
        index = self.table.index
        if isinstance(index, GgufIndex) and self.gguf is not None:
            return gguf_dense_nbytes(index, self.gguf)
        growth = dense_growth(index, self.form, self.matrices, self.components, self.table, self.ignored.names)
        return index.nbytes - self.table.expert_nbytes + growth


def outline(folder: Path, index: CheckpointIndex) -> Outline:
    """Build the model of `folder` on the meta device, and map its experts to the bytes of `index`.

    Raises:
        UnsupportedModelError: the model is dense, its experts cannot be replaced, or it is not a causal language model.
        CorruptCheckpointError: expert tensors are absent, or their shapes differ from the config.
    """
    if isinstance(index, GgufIndex):
        return _outline_gguf(index)
    # First, as transformers' config gives no useful error for an invalid quantisation.
    form, matrices, components = quantised_matrices(folder, index)
    config = read_config(folder)
    is_quantised = form is not None or getattr(config, "quantization_config", None) is not None
    _forget_quantisation(config)
    meta_model = _meta_model(folder, config, index)
    found = _find_experts(folder, config, meta_model)
    of_experts = sum(one.num_experts * len(one.parameters) for one in found)
    check_number(index, len(meta_model.state_dict()) + of_experts)
    components |= idle_biases(index, matrices, meta_model.state_dict().keys())
    sources, unplaced, placed = map_sources(meta_model, found, {*(set(index.tensors) - components), *matrices})
    layers: list[LayerExperts] = []
    targets: set[str] = set()
    for one in found:
        layer_sources = [sources.get((one.name, p.name)) or _absent(folder, one.name, p) for p in one.parameters]
        targets |= one.all_tensors
        layer = quantised_layer(one.name, one.num_experts, layer_sources, index, form, matrices)
        layers.append(replace(layer, form=one.form))
    ignored = sort_unplaced(folder, meta_model, unplaced, is_quantised=is_quantised)
    state = meta_model.state_dict()
    dense = {name: state[target] for name, target in placed.items()}
    _check_shapes(folder, dense, {name: index.tensors[name].shape for name in dense.keys() & index.tensors.keys()})
    num_parameters, num_embeddings = _counts(meta_model)
    return Outline(
        config,
        tuple(one.name for one in found),
        ExpertTable(tuple(layers), index),
        frozenset(targets),
        frozenset(one.holder_class for one in found),
        form,
        matrices,
        components,
        ignored,
        dense_matrices(meta_model, placed, max(layer.num_experts for layer in layers)),
        num_parameters=num_parameters,
        num_embeddings=num_embeddings,
    )


def _find_experts(folder: Path, config: Any, meta_model: nn.Module) -> list[FoundExperts]:
    with named(f"{_source(folder)} describes no experts that can be computed", CheckpointError):
        found = find_experts(meta_model)
    if not found:
        raise UnsupportedModelError(_why_no_experts(folder, config, meta_model))
    most = max(one.num_experts for one in found)
    if most < 1:
        raise CheckpointError(f"{_source(folder)} gives the model no experts.")
    check_choice(config, most, _source(folder))
    return found


def _outline_gguf(index: GgufIndex) -> Outline:
    config = gguf_config(index)
    meta_model = _meta_model(index.folder, config, index)
    found = _find_experts(index.folder, config, meta_model)
    layers = [gguf_layer(one.name, one.num_experts, one.parameters, one.form, index) for one in found]
    modules = {one.name: meta_model.get_submodule(one.name) for one in found}
    names = name_tensors(index, meta_model, config, modules)
    targets = frozenset(f"{one.name}.{p.name}" for one in found for p in one.parameters)
    classes = frozenset(one.holder_class for one in found)
    table = ExpertTable(tuple(layers), index)
    num_parameters, num_embeddings = _counts(meta_model)
    return Outline(
        config,
        tuple(modules),
        table,
        targets,
        classes,
        gguf=names,
        num_parameters=num_parameters,
        num_embeddings=num_embeddings,
    )


def _counts(meta_model: nn.Module) -> tuple[int, int]:
    """Numbers in the weights of a whole model, tied ones once: all of them, and those of embedding tables."""
    tables = [module.weight for module in meta_model.modules() if isinstance(module, nn.Embedding)]
    in_tables = sum(weight.numel() for weight in {id(table): table for table in tables}.values())
    return sum(parameter.numel() for parameter in meta_model.parameters()), in_tables


def load_skeleton(
    folder: Path, sketch: Outline, dtype: torch.dtype | str, blocks: DenseBlocks | None = None,
    store: PackedStore | None = None, **kwargs: Any,
) -> PreTrainedModel:  # fmt: skip
    """Load everything but the experts of `sketch` with transformers' `from_pretrained`, from its files in `folder`.

    Args:
        dtype: compute dtype of the dense weights, or "auto" for the checkpoint's.
        blocks: the dense weights that stay in blocks, or None. store: a packed store whose dense weights, if it has
            any, replace the checkpoint's.
        kwargs: for `from_pretrained` (attn_implementation, ...); `noted` for `from_state`.
    Raises:
        CheckpointError: transformers cannot load it.
        CorruptCheckpointError: keys other than the experts' are missing, unexpected or of another shape; or
            generation_config.json is damaged.
        ReadError: a file changed since its header was read, or cannot be read.
    """
    check_generation_settings(folder)
    model_class, config = _model_class(folder, sketch.config)
    state, compute = stored_weights(sketch, dtype)
    if store is not None:
        numbers = next((one for one in (compute, sketch.config.dtype) if isinstance(one, torch.dtype)), None)
        state = packed_state(store, state, numbers)
    wrong = f"{folder} cannot be loaded by transformers"
    with named(wrong, CheckpointError), swapped_experts(sketch.experts_classes), _quiet_loading():
        if blocks is None:
            model, info = from_state(model_class, folder, state, config=config, dtype=compute, **kwargs)
        else:
            model, info = _with_blocks(blocks, model_class, folder, state, config=config, dtype=compute, **kwargs)
    kept = frozenset() if blocks is None else blocks.kept
    # transformers names what it finds no place for as it is stored, where the model's class lacks a prefix.
    stored = {
        one for layer in sketch.table.layers for source in layer.sources for group in source.groups for one in group
    }
    _check_loading_info(folder, info, sketch.expert_targets | sketch.ignored.targets | kept | stored)
    tell(sketch.notes, folder)
    return model.eval()


def _with_blocks(
    blocks: DenseBlocks, model_class: Any, folder: Path, state: Mapping[str, Any], *, config: Any, **kwargs: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """`from_state` of a model whose dense matrices stay in blocks."""
    is_tied = config.tie_word_embeddings
    if blocks.holds_embedding:
        config.tie_word_embeddings = False  # there are no parameters to tie: the two layers share their blocks
    try:
        model, info = from_state(
            blocks.build(model_class, state, is_tied=is_tied), folder, state, config=config, **kwargs
        )
    finally:
        config.tie_word_embeddings = is_tied
    made: Any = model
    made.config.tie_word_embeddings = is_tied
    made.__class__ = model_class
    return made, info


def stored_weights(sketch: Outline, dtype: torch.dtype | str) -> tuple[Mapping[str, Any], torch.dtype | str]:
    """The weights by name, read when they are indexed, and their compute dtype, to which quantised ones are turned."""
    index = sketch.table.index
    if sketch.form is None and not isinstance(index, GgufIndex):
        return stored_state(index), dtype
    compute = dtype if isinstance(dtype, torch.dtype) else sketch.config.dtype
    compute = compute if isinstance(compute, torch.dtype) else torch.bfloat16
    if isinstance(index, GgufIndex):
        assert sketch.gguf is not None, "its tensors have names"
        return gguf_state(index, sketch.gguf, compute), compute
    assert sketch.form is not None, "it is dequantised"
    state = dense_state(index, sketch.form, sketch.matrices, sketch.components, compute, sketch.ignored.names)
    return state, compute


def _forget_quantisation(config: Any) -> None:
    """Remove the quantisation settings: weights are dequantised here, so that transformers sees a plain model."""
    for one in {id(config): config, id(config.get_text_config()): config.get_text_config()}.values():
        if hasattr(one, "quantization_config"):
            del one.quantization_config


@contextlib.contextmanager
def swapped_experts(classes: frozenset[type[nn.Module]]) -> Iterator[None]:
    """Within the context, each class's modeling module has the class without weights under the same name."""
    with _SWAP_LOCK:
        replaced: list[tuple[Any, str, type[nn.Module]]] = []
        try:
            for cls in classes:
                module = sys.modules[cls.__module__]
                for attribute in [name for name, value in vars(module).items() if value is cls]:
                    replaced.append((module, attribute, cls))
                    setattr(module, attribute, without_experts(cls))
            yield
        finally:
            for module, attribute, cls in replaced:
                setattr(module, attribute, cls)


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silence transformers' load report and progress bar: the loading info is checked here, more strictly."""
    from transformers.utils import logging as transformers_logging

    previous_level, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(previous_level)
        if had_bars:
            transformers_logging.enable_progress_bar()


def auto_class(folder: Path, config: Any) -> Any:
    """Choose transformers' Auto class for text generation; multimodal models and encoder-decoders have their own."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        GenerationMixin,
    )

    for found in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM):
        # Not `can_generate`: it is also true of models that do not generate token by token.
        if type(config) in found._model_mapping and issubclass(_candidate(found, config), GenerationMixin):
            return found
    raise UnsupportedModelError(
        f"{folder}: {config.model_type} is not a causal language model in transformers; foreroute runs those only."
    )


def _model_class(folder: Path, config: Any) -> tuple[Any, Any]:
    """The class that the Auto class makes of the config, and the config that it takes: the text part, or all."""
    found = _candidate(auto_class(folder, config), config)
    text_class = config.sub_configs.get("text_config")
    takes_text = text_class is not None and found.config_class is text_class
    return found, config.get_text_config() if takes_text else config


def _candidate(auto_class: Any, config: Any) -> Any:
    """The Auto class's candidate that the config names, else the first."""
    found = auto_class._model_mapping[type(config)]
    if not isinstance(found, (list, tuple)):
        return found
    by_name = {candidate.__name__: candidate for candidate in found}
    return next((by_name[name] for name in config.architectures or () if name in by_name), found[0])


def _meta_model(folder: Path, config: Any, index: CheckpointIndex) -> nn.Module:
    model_classes = auto_class(folder, config)
    check_against(config, index)
    wrong = f"{_source(folder)} describes no {config.model_type} model that can be built"
    # Another thread may have swapped classes: a model built meanwhile would have no experts to find.
    with named(wrong, CheckpointError), _SWAP_LOCK, torch.device("meta"):
        model: nn.Module = model_classes.from_config(config)
        return model


def _source(folder: Path) -> Path:
    """The file that describes the model."""
    return folder if is_gguf(folder) else folder / "config.json"


def _why_no_experts(folder: Path, config: Any, model: nn.Module) -> str:
    if config.model_type in REFUSED and getattr(config, "is_moe", True):
        return (
            f"{folder}: the experts of {config.model_type} are not offloaded: {REFUSED[config.model_type]}. "
            "Run it with transformers itself."
        )
    has_experts = any("expert" in name for name, _ in model.named_modules())
    if has_experts:
        return (
            f"{folder}: the experts of {config.model_type} do not go through transformers' shared experts interface "
            "(use_experts_implementation), and foreroute has no adapter for them (docs/families.md). Run it with "
            "transformers itself."
        )
    return (
        f"{folder} is a dense model ({config.model_type}): it has no experts to offload. "
        "Run it with transformers itself; foreroute is for Mixture-of-Experts models."
    )


def _check_shapes(folder: Path, dense: Mapping[str, torch.Tensor], stored: Mapping[str, Sequence[int]]) -> None:
    """Raises CorruptCheckpointError where transformers would reinitialise a tensor, of whatever size the config has."""
    for name, shape in stored.items():
        if name in dense and tuple(shape) != tuple(dense[name].shape):
            raise CorruptCheckpointError(
                f"{folder}: {name} has another shape than config.json says: {list(shape)} in place of "
                f"{list(dense[name].shape)}."
            )


def _absent(folder: Path, module_name: str, parameter: ExpertParameter) -> PartSource:
    raise CorruptCheckpointError(
        f"{folder} stores nothing for {module_name}.{parameter.name}, which its config.json asks for. A shard is "
        "missing, or the experts are stored in a format that foreroute does not read."
    )


def _check_loading_info(folder: Path, info: dict[str, Any], not_loaded: frozenset[str]) -> None:
    missing = sorted(info["missing_keys"])
    unexpected = sorted(set(info["unexpected_keys"]) - not_loaded)
    mismatched = sorted(info["mismatched_keys"])
    if missing:
        raise CorruptCheckpointError(f"{folder} lacks {missing[0]} ({len(missing)} missing tensors).")
    if mismatched:
        raise CorruptCheckpointError(f"{folder}: {mismatched[0]} has another shape than config.json says.")
    if unexpected:
        raise CorruptCheckpointError(
            f"{folder} holds {unexpected[0]}, which the model has no place for ({len(unexpected)} such tensors). "
            "config.json and the weights are of different models."
        )


def offloaded_modules(model: nn.Module) -> dict[str, OffloadedExperts]:
    """The experts modules of a loaded skeleton by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OffloadedExperts)}
