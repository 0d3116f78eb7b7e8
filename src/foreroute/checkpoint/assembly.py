"""Describe how a family's tensors are made of stored ones, without reading a byte.

Of an unquantised checkpoint one expert's tensors are assembled. transformers describes the way from a checkpoint to its
fused tensors as operations on real tensors. Here the same operations act on *byte ranges*: an `Assembled` tensor is a
set of pieces, each a strided view of a stored tensor with its place in the result. All tensors carry a leading expert
dimension of extent 1, so that the operations' dimensions mean the same as in transformers.

Of one that was published quantised, a slot holds what the checkpoint stores (blocks, scales, zero points), dequantised
when an expert is computed. A `Coding` says how; kernels/torch/dequantise.py does it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from foreroute.checkpoint.index import ITEMSIZE, TensorEntry
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError

# Prefix of the codings of GGUF's blocks, before the quantisation's name.
GGUF_PREFIX = "gguf:"
# Hugging Face's MXFP4 in blocks as large as ggml's: an exponent, then 32 four-bit floats, two neighbours to a byte.
MXFP4_IN_BLOCKS = "mxfp4-in-blocks"
MXFP4_BLOCK_BYTES = 17


# How gate and up share a matrix of the family: one above the other, or row by row in turn; "" is one matrix, or an
# order that is not known, which then stays one matrix.
Gates = Literal["", "halves", "alternating"]

_KNOWN = frozenset({"MergeModulelist", "Concatenate", "Transpose", "Interleave"})


@dataclass(frozen=True, slots=True)
class FamilyForm:
    """How a family keeps an expert's matrices.

    is_transposed: as [in, out]. gates: how gate and up are joined. is_down_transposed: the second matrix alone is
    [in, out].
    """

    is_transposed: bool = False
    gates: Gates = ""
    is_down_transposed: bool = False

    def transposes(self, part: str) -> bool:
        """Whether the family keeps its matrix `part` as [in, out]."""
        return self.is_transposed or (self.is_down_transposed and part == "down_proj")


@dataclass(frozen=True, slots=True)
class Coding:
    """How to dequantise a stored matrix.

    kind: a name that kernels/torch/dequantise.py knows.
    block: rows and columns that share a scale; 0 for all of them.
    is_zero_shifted: zero points are stored one too small (GPTQ's first format).
    order: of blocks with eight rows side by side, the order of their bits (kernels/ggml/interleaved.py); "" for rows
        one after the other.
    rounded_to: the dtype that numbers are rounded to where torch dequantises them; "" for none. Of a published format
        in blocks that hold it exactly: that of its scales, to which its own products are rounded.
    """

    kind: str
    block: tuple[int, int] = (0, 0)
    is_zero_shifted: bool = False
    order: str = ""
    rounded_to: str = ""

    @property
    def block_type(self) -> str:
        """ggml's name of the blocks; "" for other codings."""
        return "MXFP4" if self.kind == MXFP4_IN_BLOCKS else self.kind.partition(GGUF_PREFIX)[2]


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One matrix [rows, cols]: its coding, and the positions of its components among an expert's stored parts."""

    coding: Coding
    at: tuple[int, ...]
    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One of the family's tensors of an expert.

    shape: as the family has it. matrices: stacked by rows; none where the tensor is stored unquantised.
    at: its position among the stored parts, if stored unquantised.
    is_transposed: the family's tensor is the matrices' transposition.
    is_interleaved: the matrices' rows alternate, in place of being stacked.
    """

    name: str
    shape: tuple[int, ...]
    matrices: tuple[StoredMatrix, ...] = ()
    at: int = -1
    is_transposed: bool = False
    is_interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """One step from stored tensors to a fused one: its kind (transformers' class name) and settings."""

    kind: str
    dim: int = 0
    other_dim: int = 0
    inverse: bool = False
    check_dims: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A strided view of a stored tensor (`src_*` in bytes) and its place in the result (`start`, `step` in items)."""

    entry: TensorEntry
    src_offset: int
    src_strides: tuple[int, ...]
    extents: tuple[int, ...]
    start: tuple[int, ...]
    step: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Assembled:
    """A tensor of `shape` (leading expert dimension of extent 1) described by its pieces."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def row_major_strides(shape: Sequence[int], dtype: str) -> tuple[int, ...]:
    """Bytes from an item to the next one along each dimension of `shape`, where items of `dtype` have no gaps."""
    return tuple(ITEMSIZE[dtype] * math.prod(shape[at + 1 :]) for at in range(len(shape)))


def whole(entry: TensorEntry, expert: int | None = None) -> Assembled:
    """Take the stored tensor `entry` as one piece: all of it (one per expert), or row `expert` of a fused one."""
    shape = entry.shape if expert is None else entry.shape[1:]
    extents = (1, *shape)
    strides = row_major_strides(extents, entry.dtype)
    src_offset = entry.offset + (0 if expert is None else expert * strides[0])
    origin = (0,) * len(extents)
    piece = Piece(entry, src_offset, strides, extents, origin, (1,) * len(extents))
    return Assembled(extents, (piece,))


def assemble(inputs: Sequence[Assembled], operations: Sequence[Operation], target_shape: Sequence[int]) -> Assembled:
    """Apply `operations` to one expert's `inputs` (one per source pattern) and check the result's shape.

    Args:
        target_shape: the expert's shape in the model, without the expert dimension.
    Raises:
        UnsupportedModelError: an unknown operation; named.
        CorruptCheckpointError: the result's shape is not that of the model's tensor.
    """
    check_known(operations)
    tensors = list(inputs)
    expected = (1, *target_shape)
    for operation in operations:
        tensors = _apply(operation, tensors, expected)
    if len(tensors) != 1 or tensors[0].shape != expected:
        name = inputs[0].pieces[0].entry.name
        shapes = " and ".join(str(list(tensor.shape[1:])) for tensor in tensors)
        raise CorruptCheckpointError(
            f"{name}: an expert's stored shape is {shapes}, the config says {list(target_shape)}. "
            "config.json and the weights are of different models."
        )
    return tensors[0]


def check_known(operations: Sequence[Operation]) -> None:
    """Raises UnsupportedModelError if one of transformers' operations is not supported; named."""
    for operation in operations:
        if operation.kind not in _KNOWN:
            raise UnsupportedModelError(
                f"The checkpoint's experts need transformers' {operation.kind} operation, which foreroute does not "
                "know. Please report the model."
            )


def _apply(operation: Operation, tensors: list[Assembled], expected: tuple[int, ...]) -> list[Assembled]:
    if operation.kind == "MergeModulelist":
        return tensors  # the inputs already have the expert dimension that it adds
    if operation.dim == 0 and operation.kind in ("Concatenate", "Interleave", "Transpose"):
        raise UnsupportedModelError(
            f"The checkpoint's experts need {operation.kind} across experts, which is not known."
        )
    if operation.kind == "Concatenate":
        return [_concatenate(tensors, operation.dim)]
    if operation.kind == "Transpose":
        if operation.check_dims and tensors[0].shape == expected:
            return tensors
        return [_transpose(tensor, operation.dim, operation.other_dim) for tensor in tensors]
    assert operation.kind == "Interleave", "the operations are known"
    return [_interleave(tensor, operation.dim, operation.inverse) for tensor in tensors]


def _at(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _concatenate(tensors: Sequence[Assembled], dim: int) -> Assembled:
    pieces: list[Piece] = []
    offset = 0
    for tensor in tensors:
        pieces.extend(replace(piece, start=_at(piece.start, dim, piece.start[dim] + offset)) for piece in tensor.pieces)
        offset += tensor.shape[dim]
    return Assembled(_at(tensors[0].shape, dim, offset), tuple(pieces))


def _transpose(tensor: Assembled, dim: int, other_dim: int) -> Assembled:
    def swapped(values: tuple[int, ...]) -> tuple[int, ...]:
        return _at(_at(values, dim, values[other_dim]), other_dim, values[dim])

    pieces = tuple(
        Piece(p.entry, p.src_offset, swapped(p.src_strides), swapped(p.extents), swapped(p.start), swapped(p.step))
        for p in tensor.pieces
    )
    return Assembled(swapped(tensor.shape), pieces)


def _interleave(tensor: Assembled, dim: int, inverse: bool) -> Assembled:
    """Reorder items 0 1 2 3 .. along `dim` to 0 2 .. 1 3 .. (or back, when `inverse`)."""
    extent = tensor.shape[dim]
    half = extent // 2
    pieces: list[Piece] = []
    for piece in tensor.pieces:
        if piece.extents[dim] != extent or piece.step[dim] != 1 or extent % 2:
            raise UnsupportedModelError("The checkpoint's experts interleave a tensor made of parts: not known.")
        stride = piece.src_strides[dim]
        for which in (0, 1):
            if inverse:
                moved = replace(piece, src_offset=piece.src_offset + which * half * stride)
                start, step, src_stride = which, 2, stride
            else:
                moved = replace(piece, src_offset=piece.src_offset + which * stride)
                start, step, src_stride = which * half, 1, 2 * stride
            pieces.append(
                replace(
                    moved,
                    src_strides=_at(moved.src_strides, dim, src_stride),
                    extents=_at(moved.extents, dim, half),
                    start=_at(moved.start, dim, start),
                    step=_at(moved.step, dim, step),
                )
            )
    return Assembled(tensor.shape, tuple(pieces))
