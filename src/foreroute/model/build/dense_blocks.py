"""Keep dense weights in blocks: which can be, the modules over them in place of torch's, and the bytes of all.

Those of safetensors that can be are of plain linear layers and embeddings. transformers builds the model by its own
constructor; what that made for a matrix in blocks is replaced before weights are loaded, so that such a matrix is read
once. The blocks are those of a GGUF file, or are made of the floats that safetensors hold (--dense).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from foreroute.checkpoint.assembly import Coding
from foreroute.checkpoint.codecs import INT4_CODINGS, INT4_TYPES, int4_misfit
from foreroute.checkpoint.index import CheckpointIndex
from foreroute.checkpoint.quantised_formats import QuantisedFormat
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError
from foreroute.kernels.ggml.library import Library
from foreroute.kernels.ggml.linear import BlockEmbedding, BlockLinear, BlockMatrix, BlockProducts, compute_together
from foreroute.kernels.ggml.quantiser import BlockMemory, UnfitWeightError, quantise_in_threads
from foreroute.kernels.ggml.types import BlockType
from foreroute.kernels.torch.int4_blocks import into_blocks, types_that_hold
from foreroute.model.build.dense_state import LazyMatrix
from foreroute.types import QUANTISED_TYPES

# Last names of layers that decide between experts, which stay floats as in llama.cpp: a route is a matter of last bits.
_ROUTERS = frozenset({"gate", "router", "classifier", "shared_expert_gate"})
# Every type's blocks are whole multiples of this number of weights.
_LEAST_BLOCK = 32

# Layers of one parent that are given the same input, in the order in which families call them.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_HALVES = {torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class DenseMatrices:
    """stored: by the model's name of a weight, its stored name. shapes: of each, [out, in]. embedding: the input's."""

    stored: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    embedding: str = ""


def dense_matrices(model: PreTrainedModel, placed: Mapping[str, str], num_experts: int) -> DenseMatrices:
    """Find the weights of `model` (on the meta device) that its linear layers and embeddings take from one tensor.

    Args:
        placed: stored names that become a tensor of the model unchanged, with its name there.
        num_experts: most of a layer; a linear layer with as many outputs is taken for a router.
    """
    stored_name = {target: name for name, target in placed.items()}
    stored: dict[str, str] = {}
    shapes: dict[str, tuple[int, int]] = {}
    embedding = ""
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if type(module) not in (nn.Linear, nn.Embedding) or weight not in stored_name:
            continue
        rows, columns = module.weight.shape
        if rows == num_experts or name.rpartition(".")[2] in _ROUTERS or columns % _LEAST_BLOCK:
            continue
        stored[weight], shapes[weight] = stored_name[weight], (rows, columns)
        if module is model.get_input_embeddings():
            embedding = weight
    return DenseMatrices(stored, shapes, embedding)


class MatrixSource(Protocol):
    """Where dense matrices in blocks come from.

    names: the model's names of those weights. embedding: that of the input's embedding, even if it is none of them.
    """

    @property
    def names(self) -> Collection[str]: ...

    @property
    def embedding(self) -> str: ...

    def read(self, name: str, state: Mapping[str, Any]) -> BlockMatrix:
        """The matrix `name`. state: the stored weights by name, read by indexing."""


class QuantisedMatrices:
    """Matrices of safetensors, quantised as they are read: see `MatrixSource`.

    Args:
        kind: the type that they get. num_threads: of the quantiser.
    """

    def __init__(self, matrices: DenseMatrices, kind: BlockType, library: Library, num_threads: int) -> None:
        self.embedding = matrices.embedding
        self._stored, self._kind, self._num_threads = matrices.stored, kind, num_threads
        self._library, self._memory = library, BlockMemory()

    @property
    def names(self) -> Collection[str]:
        """See `MatrixSource`."""
        return self._stored

    def read(self, name: str, state: Mapping[str, Any]) -> BlockMatrix:
        """See `MatrixSource`.

        Raises:
            CorruptCheckpointError: a weight is no number, or too large.
        """
        stored = state[self._stored[name]]
        # In full: what a store gets must not depend on the compute dtype.
        numbers = stored.numbers(torch.float32) if isinstance(stored, LazyMatrix) else stored[...]
        try:
            blocks = quantise_in_threads(self._library, self._kind, numbers, self._num_threads, self._memory)
        except UnfitWeightError as error:
            raise CorruptCheckpointError(f"{self._stored[name]}: {error}. Load or pack without --dense.") from None
        return BlockMatrix(self._kind, numbers.shape[1], blocks)


class StoredMatrices:
    """Matrices of safetensors where experts are blocks: 16-bit floats as they are stored; quantised ones as below.

    Four-bit integers are put into ggml's blocks that hold them exactly. Others become floats of 16 bits, as torch's
    math has them: of their scales' dtype, or bfloat16. See `MatrixSource`.

    Args:
        quantised: stored names of the quantised ones' components.
    """

    def __init__(
        self,
        matrices: DenseMatrices,
        index: CheckpointIndex,
        quantised: Mapping[str, tuple[str, ...]],
        products: BlockProducts,
    ) -> None:
        self.embedding = matrices.embedding
        self._types, self._memory = products.library.types, BlockMemory()
        self._stored = {
            ours: name
            for ours, name in matrices.stored.items()
            if name in quantised or (name in index.tensors and index.tensors[name].dtype in _HALVES.values())
        }

    @property
    def names(self) -> Collection[str]:
        """See `MatrixSource`."""
        return self._stored

    def read(self, name: str, state: Mapping[str, Any]) -> BlockMatrix:
        """See `MatrixSource`."""
        stored = state[self._stored[name]]
        dtype = None
        if isinstance(stored, LazyMatrix):
            components, (rows, columns) = stored.components(), stored.shape
            if kind := _held_in(stored.coding, columns, components):
                matrix = self._new(kind, rows, columns)
                into_blocks(kind, stored.coding, components, matrix.blocks)
                return matrix
            dtype = components[1].dtype if components[1].dtype in _HALVES else torch.bfloat16
        numbers = stored[...].to(dtype)
        matrix = self._new(_HALVES[numbers.dtype], *numbers.shape)
        matrix.blocks.copy_(numbers.contiguous().view(torch.uint8))
        return matrix

    def _new(self, kind_name: str, rows: int, columns: int) -> BlockMatrix:
        kind = self._types[kind_name]
        return BlockMatrix(kind, columns, self._memory.take(rows, kind.row_bytes(columns)))


class DenseBlocks:
    """The dense matrices of a model that stay in blocks.

    Args:
        products: computes with them. dtype: of biases and of an embedding's rows.
    Attributes:
        kept: names of the parameters that blocks replace, once the model was made.
        noted: called with the bytes of each matrix as it is read.
    """

    def __init__(self, source: MatrixSource, products: BlockProducts, dtype: torch.dtype) -> None:
        self._source, self._products, self._dtype = source, products, dtype
        self._matrices: dict[str, BlockMatrix] = {}
        self.kept: frozenset[str] = frozenset()
        self.noted: Callable[[int], None] = lambda nbytes: None

    @property
    def holds_embedding(self) -> bool:
        """Whether the input's embedding stays in blocks, which a tied head then shares."""
        return self._source.embedding in self._source.names

    def build(self, model_class: type[Any], state: Mapping[str, Any], *, is_tied: bool) -> type[Any]:
        """A subclass of transformers' `model_class` that passes for it, whose constructor replaces those layers.

        Args:
            state: the stored weights by name. is_tied: the head's weight is the embedding's.
        """
        blocks = self

        def construct(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            model_class.__init__(self, config, *args, **kwargs)
            blocks.replace(self, state, is_tied=is_tied)

        own = {"__module__": model_class.__module__, "__init__": construct}
        return type(model_class.__name__, (model_class,), own)

    def replace(self, model: PreTrainedModel, state: Mapping[str, Any], *, is_tied: bool) -> None:
        """Replace the layers of `model` whose weights stay in blocks. Arguments: see `build`."""
        head = model.get_output_embeddings() if is_tied else None
        replaced: list[str] = []
        with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
            for name, module in [*model.named_modules()]:
                if type(module) is not nn.Linear and _scale_of(module) is None:
                    continue
                weight = f"{name}.weight"
                matrix = self._tied(weight, state) if module is head else self._matrix(weight, state)
                if matrix is not None:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, self._module(module, matrix))
                    replaced.append(f"{name}.weight")
        self.kept = frozenset(replaced)
        head = model.get_output_embeddings()
        if isinstance(head, BlockLinear):
            head.is_head = True
        for parent_module in model.modules():
            for names in _TOGETHER:
                layers = [getattr(parent_module, name, None) for name in names]
                linear = [layer for layer in layers if isinstance(layer, BlockLinear)]
                if len(linear) == len(names) and len({layer.in_features for layer in linear}) == 1:
                    compute_together(linear)

    def _tied(self, name: str, state: Mapping[str, Any]) -> BlockMatrix | None:
        """The blocks of a tied head: the embedding's, unless others are stored for it, which transformers takes."""
        embedding, own = self._matrix(self._source.embedding, state), self._matrix(name, state)
        is_another = own is not None and embedding is not None and not torch.equal(own.blocks, embedding.blocks)
        return own if is_another else embedding

    def _matrix(self, name: str, state: Mapping[str, Any]) -> BlockMatrix | None:
        """The blocks of a weight, read once; None where it does not stay in blocks."""
        if name not in self._matrices and name in self._source.names:
            matrix = self._matrices[name] = self._source.read(name, state)
            self.noted(matrix.blocks.nbytes)
        return self._matrices.get(name)

    def _module(self, module: nn.Module, matrix: BlockMatrix) -> nn.Module:
        if isinstance(module, nn.Embedding):
            scale = _scale_of(module)
            assert scale is not None, "others are not replaced"
            return BlockEmbedding(matrix, self._products, module.padding_idx, self._dtype, scale)
        assert isinstance(module, nn.Linear)
        with torch.device("meta"):
            return BlockLinear(matrix, self._products, module.bias is not None, self._dtype)


def _scale_of(module: nn.Module) -> float | None:
    """What an embedding multiplies its rows by: 1, but for Gemma's class. None for other modules."""
    if type(module) is nn.Embedding:
        return 1.0
    return getattr(module, "scalar_embed_scale", None) if isinstance(module, nn.Embedding) else None


def _held_in(coding: Coding, columns: int, components: Sequence[torch.Tensor]) -> str:
    """The smallest type of blocks that holds a matrix of `columns` exactly; "" where none does."""
    if coding.kind not in INT4_CODINGS or int4_misfit(coding, columns):
        return ""
    scales, *zeros = components[1:]
    return next(iter(types_that_hold(coding, scales, zeros[0] if zeros else None)), "")


def check_rows(matrices: DenseMatrices, kind: BlockType, types: Mapping[str, BlockType]) -> None:
    """Check that rows of all matrices are whole blocks of `kind`; `types`: all of ggml's.

    Raises:
        UnsupportedModelError: one whose rows are not; named, with the types that can take all of them.
    """
    for name, (_, columns) in matrices.shapes.items():
        if columns % kind.weights:
            others = [
                one.lower()
                for one in QUANTISED_TYPES
                if one in types and not any(columns % types[one].weights for _, columns in matrices.shapes.values())
            ]
            raise UnsupportedModelError(
                f"--dense {kind.name.lower()} cannot take {name}: its rows have {columns} weights, which are no whole "
                f"blocks of {kind.weights}. --dense {', '.join(others[:-1])} or {others[-1]} can."
            )


def quantised_nbytes(matrices: DenseMatrices, kind: BlockType, index: CheckpointIndex, dense_nbytes: int) -> int:
    """Bytes of the dense weights of `index` with these matrices in blocks, and all else in f32.

    Args:
        dense_nbytes: as they are stored; of quantised ones in 16 bits.
    """
    stored = [index.tensors[name] for name in matrices.stored.values() if name in index.tensors]
    itemsize = 4 if any(entry.dtype == "F32" for entry in stored) else 2
    numbers = sum(rows * columns for rows, columns in matrices.shapes.values())
    blocks = sum(rows * kind.row_bytes(columns) for rows, columns in matrices.shapes.values())
    return blocks + max(0, dense_nbytes - itemsize * numbers) * 4 // itemsize


def int4_saving(
    matrices: DenseMatrices, form: QuantisedFormat, quantised: Mapping[str, tuple[str, ...]], index: CheckpointIndex,
    products: BlockProducts,
) -> int:  # fmt: skip
    """Bytes that four-bit integers of dense matrices, held by blocks, take less than 16 bits a weight; at least.

    Args:
        form: of the checkpoint. quantised: stored names of its matrices' components.
    """
    largest = products.library.types[INT4_TYPES[-1]]
    shapes = [
        matrices.shapes[ours]
        for ours, name in matrices.stored.items()
        # A float16 is held for certain; a scale of another dtype has to be read first.
        if name in quantised and form.coding.kind in INT4_CODINGS and index.tensors[quantised[name][1]].dtype == "F16"
        if not int4_misfit(form.coding_of(name), matrices.shapes[ours][1])
    ]
    return sum(rows * (2 * columns - largest.row_bytes(columns)) for rows, columns in shapes)


def dense_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every dense weight of `model` with its name, each memory once; blocks are uint8 [rows, bytes of a row]."""
    yield from model.named_parameters()
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, BlockLinear | BlockEmbedding) and id(module.matrix) not in seen:
            seen.add(id(module.matrix))  # a tied head shares the embedding's
            yield f"{name}.weight", module.matrix.blocks


def dense_nbytes(model: PreTrainedModel) -> int:
    """Bytes of those."""
    return sum(tensor.nbytes for _, tensor in dense_weights(model))
