"""Name a GGUF file's tensors as the model has them, by the gguf package's own map turned round; read the dense ones."""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from foreroute.checkpoint.assembly import GGUF_PREFIX, Coding, FamilyForm, StoredMatrix, StoredPart
from foreroute.checkpoint.gguf_file import EXPERT_BLOCKS, GgufIndex, gguf_package
from foreroute.checkpoint.layouts import LayerExperts, PartSource, layer_experts
from foreroute.checkpoint.source_files import SourceFile
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError
from foreroute.kernels.torch.gguf_blocks import dequantise_gguf
from foreroute.model.experts import ExpertParameter
from foreroute.model.gguf.changes import TensorChange
from foreroute.model.gguf.metadata import GgufMetadata
from foreroute.model.gguf.positions import DIVISORS
from foreroute.model.gguf.settings import family_of

_BLOCK = re.compile(r"blk\.(\d+)\.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
# What an expert's parameters are made of.
_WHICH: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",),
}  # fmt: skip
# Tensors of positions, which the settings have.
_OF_SETTINGS = frozenset({"rope_factors_long.weight", "rope_factors_short.weight", DIVISORS})


@dataclass(frozen=True)
class GgufTensor:
    """A dense parameter [*shape] of the model: the tensors that it is made of, and how, if they are changed."""

    shape: tuple[int, ...]
    stored: tuple[str, ...]
    change: TensorChange | None = None


@dataclass(frozen=True)
class GgufNames:
    """The dense tensors of a file, by parameter; the config of their model; notes on tensors that are not read."""

    dense: Mapping[str, GgufTensor]
    config: Any
    notes: tuple[str, ...] = ()

    @property
    def stored(self) -> frozenset[str]:
        """Names of all dense tensors."""
        return frozenset(name for tensor in self.dense.values() for name in tensor.stored)


def name_tensors(index: GgufIndex, model: nn.Module, config: Any, experts: Collection[str]) -> GgufNames:
    """Find what every dense parameter of `model` (on the meta device) is made of.

    Args:
        experts: the names of its experts modules.
    Raises:
        UnsupportedModelError: a tensor that has no place in the model.
        CorruptCheckpointError: a tensor is absent, or has another shape than the metadata say.
    """
    gguf = gguf_package()
    metadata, family = GgufMetadata(index), family_of(index)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == index.architecture)
    places = gguf.get_tensor_name_map(number, metadata.num_layers)
    dense: dict[str, GgufTensor] = {}
    for name, parameter in model.state_dict().items():
        if any(name.startswith(f"{module}.") for module in experts):
            continue
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        change = next((change for end, change in family.changes.items() if name.endswith(end)), None)
        stored, change = _stored(name, change, places, family.spellings, index)
        dense[name] = GgufTensor(tuple(parameter.shape), stored, change)
    names = GgufNames(dense, config)
    notes = tuple(_check_rest(index, names, metadata.num_layers))
    for name, tensor in dense.items():
        _check_present(index, name, tensor)
    return replace(names, notes=notes)


def _stored(
    name: str, change: TensorChange | None, places: Any, spellings: Mapping[str, str], index: GgufIndex
) -> tuple[tuple[str, ...], TensorChange | None]:
    """What parameter `name` is made of, if that is stored, and the change that is left."""
    spelt = next((name.replace(ours, theirs) for ours, theirs in spellings.items() if ours in name), name)
    candidates = [found for found in (_placed(one, places) for one in _spellings(spelt)) if found]
    present = next((found for place in candidates for found in _endings(place) if found in index.tensors), None)
    layer = _LAYER.search(name)
    if change is not None and change.stored and layer is not None:
        parts = tuple(f"blk.{layer[1]}.{part}" for part in change.stored)
        # Older files have the tensor whole, as the family has it.
        if present is None or parts[0] in index.tensors:
            return parts, change
        change = None
    return (*candidates[:1],) if present is None else (present,), change


def _spellings(name: str) -> Iterator[str]:
    """A parameter's name, and with its bias as a tensor of its own."""
    yield name
    if name.endswith("_bias"):
        stem = name.removesuffix("_bias")
        yield from (f"{stem}.bias", f"{stem}_proj.bias")


def _placed(name: str, places: Any) -> str | None:
    found: str | None = places.get_name(name, try_suffixes=(".weight", ".bias"))
    return found


def _endings(place: str) -> Iterator[str]:
    """A stored name; also with an ending, as parameters of their own have none."""
    yield place
    if not place.endswith((".weight", ".bias")):
        yield from (f"{place}.weight", f"{place}.bias")


def _check_present(index: GgufIndex, name: str, tensor: GgufTensor) -> None:
    """Check that what parameter `name` is made of is stored, in its shape, extents of 1 aside."""
    if not tensor.stored:
        raise UnsupportedModelError(
            f"{index.folder}: the gguf package has no name for {name}, which transformers' model has. Take the model's "
            "safetensors."
        )
    absent = next((one for one in tensor.stored if one not in index.tensors), None)
    if absent is not None:
        raise CorruptCheckpointError(
            f"{index.folder} lacks {absent} ({name} in transformers' model). Its converter is too old, or not "
            "llama.cpp's."
        )
    stored, shape = index.shapes[tensor.stored[0]], tensor.shape
    # A vector may be stored by groups of its numbers.
    if len(tensor.stored) > 1 or len(shape) == 1:
        is_alike = sum(math.prod(index.shapes[one]) for one in tensor.stored) == math.prod(shape)
    else:
        is_alike = [extent for extent in stored if extent != 1] == [extent for extent in shape if extent != 1]
    if not is_alike:
        raise CorruptCheckpointError(
            f"{index.folder}: {tensor.stored[0]} has another shape than the metadata say: {list(stored)} in place of "
            f"{list(shape)} ({name})."
        )


def _check_rest(index: GgufIndex, names: GgufNames, num_layers: int) -> Iterator[str]:
    """Check that the other tensors are experts', or need not be read; yield notes about the latter."""
    beyond: list[str] = []
    for name in index.tensors.keys() - names.stored - _OF_SETTINGS:
        block = _BLOCK.match(name)
        if block is not None and int(block[1]) >= num_layers:
            beyond.append(name)
        elif block is None or "_exps." not in name:
            raise UnsupportedModelError(
                f"{index.folder}: {name} is not known in a model of architecture {index.architecture}. Take the "
                "model's safetensors."
            )
    if beyond:
        yield (
            "Layers of multi-token prediction are left unread: one token is predicted at a time "
            f"({len(beyond)} tensors, first {min(beyond)})."
        )


def gguf_layer(
    name: str, num_experts: int, parameters: Sequence[ExpertParameter], form: FamilyForm, index: GgufIndex
) -> LayerExperts:
    """Lay out one layer's experts as the file `index` has them: gate, up and down in blocks, each of them one range.

    Args:
        name: of the module with `num_experts` experts. parameters: in the module's order. form: how it keeps them.
    Raises:
        CorruptCheckpointError: a tensor is absent, or its shape differs from the metadata.
    """
    found = _LAYER.search(name)
    assert found is not None, f"{name} is in no layer"
    sources: list[PartSource] = []
    parts: list[StoredPart] = []
    for parameter in parameters:
        stem = parameter.name.removesuffix("_bias")
        is_up, ending = stem == "gate_up_proj", "weight" if stem == parameter.name else "bias"
        block, which = f"blk.{found[1]}.ffn_", _WHICH[stem]
        # One tensor of both, as a switch of the converter makes it.
        if is_up and form.gates == "halves" and f"{block}gate_up_exps.{ending}" in index.tensors:
            which = ("gate_up",)
        stored = [f"{block}{one}_exps.{ending}" for one in which]
        matrices = []
        for tensor in stored:
            source, matrix = _matrix(parameter.name, tensor, len(sources), index)
            sources.append(source)
            matrices.append(matrix)
        is_transposed = form.is_transposed and ending == "weight"
        made = (sum(matrix.rows for matrix in matrices), matrices[0].cols)
        shape = parameter.shape if len(parameter.shape) > 1 else (*parameter.shape, 1)
        if (made[::-1] if is_transposed else made) != shape:
            raise CorruptCheckpointError(
                f"{index.folder}: {stored[0]} gives an expert {list(made)}, the metadata {list(parameter.shape)}."
            )
        alternate = is_up and form.gates == "alternating" and len(matrices) > 1
        parts.append(
            StoredPart(
                parameter.name,
                parameter.shape,
                tuple(matrices),
                is_transposed=is_transposed,
                is_interleaved=alternate,
            )
        )
    laid = layer_experts(name, num_experts, sources, index)
    kinds = sorted({index.kinds[source.groups[0][0]] for source in sources if source.groups[0][0].endswith("weight")})
    return LayerExperts(
        name, num_experts, laid.layout, laid.sources, tuple(parts), f"gguf {'+'.join(kinds)}", form=form
    )


def _matrix(part: str, tensor: str, at: int, index: GgufIndex) -> tuple[PartSource, StoredMatrix]:
    if tensor not in index.tensors:
        raise CorruptCheckpointError(f"{index.folder} lacks {tensor}. Its converter is too old, or not llama.cpp's.")
    kind = index.kinds[tensor]
    if len(index.tensors[tensor].shape) != 3:
        raise CorruptCheckpointError(
            f"{index.folder}: {tensor} is {list(index.shapes[tensor])}, not a matrix of each expert. Download it again."
        )
    rows, row_bytes = index.tensors[tensor].shape[1:]
    weights, nbytes = EXPERT_BLOCKS[kind]
    source = PartSource(f"{part}.{at}", (rows, row_bytes), ((tensor,),), dtypes=("U8",))
    return source, StoredMatrix(Coding(GGUF_PREFIX + kind), (at,), rows, row_bytes // nbytes * weights)


def gguf_dense_nbytes(index: GgufIndex, names: GgufNames) -> int:
    """Bytes of the dense weights when dequantised to 16 bit."""
    return sum(2 * math.prod(index.shapes[name]) for name in names.stored)


class LazyGgufTensor:
    """A dense parameter [*shape], read and dequantised when it is indexed."""

    def __init__(self, index: GgufIndex, tensor: GgufTensor, config: Any, dtype: torch.dtype) -> None:
        self._index, self._tensor, self._config, self.dtype = index, tensor, config, dtype

    def is_floating_point(self) -> bool:
        """As in torch's tensors."""
        return True

    def __getitem__(self, at: Any) -> torch.Tensor:
        numbers = [_numbers(self._index, name) for name in self._tensor.stored]
        change = self._tensor.change
        made = numbers[0] if change is None else change.make(numbers, self._config)
        return made.reshape(self._tensor.shape).to(self.dtype)[at]


def _numbers(index: GgufIndex, name: str) -> torch.Tensor:
    """The stored tensor in fp32."""
    entry, shape = index.tensors[name], index.shapes[name]
    raw = torch.empty(math.prod(shape[:-1]), entry.nbytes // math.prod(shape[:-1]), dtype=torch.uint8)
    with SourceFile(entry.path, index.files.get(entry.path)) as file:
        file.read_into(entry.offset, raw.view(-1).numpy().data)
    return dequantise_gguf(index.kinds[name], raw).view(shape)


def gguf_state(index: GgufIndex, names: GgufNames, dtype: torch.dtype) -> dict[str, LazyGgufTensor]:
    """Every dense parameter by its name, in `dtype`; no experts.

    Each is read when transformers loads it, which costs one in fp32 beside the result.

    Raises:
        ReadError: when read: the file changed since its header was read, ends too early, or the disk failed.
    """
    return {ours: LazyGgufTensor(index, tensor, names.config, dtype) for ours, tensor in names.dense.items()}
