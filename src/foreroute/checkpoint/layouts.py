"""Lay out an expert's parts in a slot, and find which bytes of the checkpoint they come from.

Names and operations come from transformers (model/build/skeleton.py asks for them); this is the arithmetic alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from foreroute.checkpoint.assembly import (
    Assembled,
    FamilyForm,
    Operation,
    Piece,
    StoredPart,
    assemble,
    check_known,
    row_major_strides,
    whole,
)
from foreroute.checkpoint.index import ITEMSIZE, CheckpointIndex, TensorEntry, merged
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError
from foreroute.types import Copy, ExpertId, ExpertKeys, ExpertReads, Read, round_up

# Alignment of a part inside a slot: matrix kernels give different bits off 16 bytes, and 64 is a cache line.
PART_ALIGNMENT = 64
# Two ranges this near in a file are read together: one request costs more than the bytes between them.
_COALESCE_GAP_BYTES = 4096
_PLAIN_FORM = FamilyForm()
_FLOAT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of an expert inside a slot: `nbytes` bytes from `offset`, row-major `shape` of `dtype`."""

    name: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The parts of one expert and the bytes of a slot that holds them (whole blocks)."""

    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the expert's tensors: what one load must move."""
        return sum(part.nbytes for part in self.parts)

    @property
    def record_bytes(self) -> int:
        """Bytes from the first part to the end of the last, gaps included: the payload of a packed record."""
        last = self.parts[-1]
        return last.offset + last.nbytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: the record, rounded up to blocks."""
        return round_up(self.record_bytes)


class Placing:
    """The parts of a slot that have been placed so far, one behind the other."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def add(self, name: str, shape: tuple[int, ...], dtype: str) -> int:
        """Place the next part; return its position."""
        offset = round_up(self.parts[-1].offset + self.parts[-1].nbytes, PART_ALIGNMENT) if self.parts else 0
        self.parts.append(Part(name, offset, math.prod(shape) * ITEMSIZE[dtype], shape, dtype))
        return len(self.parts) - 1

    @property
    def layout(self) -> ExpertLayout:
        """The layout of all of them."""
        return ExpertLayout(tuple(self.parts))


@dataclass(frozen=True, slots=True)
class PartSource:
    """Where one part of every expert of a layer comes from.

    part: the parameter's name inside the experts module ("gate_up_proj").
    shape: one expert's shape in the model.
    groups: per source pattern, the stored tensors' names: one per expert in expert order, or a single fused one.
    operations: what transformers does to them, in order.
    dtypes: those that the stored tensors may have.
    rows_of_each: an expert's rows in a tensor that has those of all experts one above the other; 0 for other tensors.
    most_stored: experts that may be stored, those without a use behind the layer's; 0: just the layer's.
    """

    part: str
    shape: tuple[int, ...]
    groups: tuple[tuple[str, ...], ...]
    operations: tuple[Operation, ...] = ()
    dtypes: tuple[str, ...] = _FLOAT_DTYPES
    rows_of_each: int = 0
    most_stored: int = 0


@dataclass(frozen=True, slots=True)
class Spread:
    """How a source's items, contiguous in the file, are spread in a slot: `copy` is of all of them, from the first."""

    source: PartSource
    copy: Copy


@dataclass(frozen=True)
class LayerExperts:
    """All experts of one MoE layer: their number, layout and sources.

    parts: the family's tensors, made from those of the layout; empty where the layout holds them directly.
    spreads: where the bytes of each source go; empty where each of them is the layout's part at its own position.
    stored_as: the format's name, if there are such parts. form: how the family keeps its matrices.
    """

    name: str
    num_experts: int
    layout: ExpertLayout
    sources: tuple[PartSource, ...]
    parts: tuple[StoredPart, ...] = ()
    stored_as: str = ""
    spreads: tuple[Spread, ...] = ()
    form: FamilyForm = _PLAIN_FORM

    @property
    def family_layout(self) -> ExpertLayout:
        """The layout of the family's own tensors, however stored; of a quantised layer, only names and shapes count."""
        if not self.parts:
            return self.layout
        return ExpertLayout(tuple(Part(part.name, 0, 0, part.shape, "F32") for part in self.parts))

    @property
    def nbytes(self) -> int:
        """Stored bytes of all experts of the layer."""
        return self.num_experts * self.expert_nbytes

    @property
    def expert_nbytes(self) -> int:
        """Stored bytes of one expert of the layer."""
        return self.layout.nbytes


def layer_experts(name: str, num_experts: int, sources: Sequence[PartSource], index: CheckpointIndex) -> LayerExperts:
    """Check the `sources` of layer `name` against the stored tensors of `index`, and lay out its `num_experts` experts.

    Every stored tensor of the layer is checked for presence, dtype and shape; none is read.

    Raises:
        CorruptCheckpointError: a tensor is absent, or has another shape or dtype than its peers or the model.
        UnsupportedModelError: unknown stored dtype, or unknown operation on the way to the model's tensors.
    """
    placing = Placing()
    for source in sources:
        check_known(source.operations)  # first: a checkpoint with unknown operations has other tensors too
        placing.add(source.part, source.shape, _check_source(name, num_experts, source, index))
        _assembled(source, 0, index)
    return LayerExperts(name, num_experts, placing.layout, tuple(sources))


def _check_source(layer_name: str, num_experts: int, source: PartSource, index: CheckpointIndex) -> str:
    dtypes: set[str] = set()
    for group in source.groups:
        absent = [name for name in group if name not in index.tensors]
        if not group or absent:
            missing = absent[0] if absent else "a tensor that it is made of"
            raise CorruptCheckpointError(f"{layer_name}.{source.part}: {missing} is not stored.")
        first = _entry(source, group, 0, index)
        if _is_fused(source, group, index):
            stored_experts = first.shape[0]
        else:
            stored_experts = len(group)
            _check_alike([index.tensors[name] for name in group])
        if stored_experts not in (num_experts, source.most_stored or num_experts):
            raise CorruptCheckpointError(
                f"{layer_name}.{source.part}: the checkpoint stores {stored_experts} experts, "
                f"{'its metadata say' if index.kind == 'gguf' else 'config.json says'} {num_experts}."
            )
        dtypes.update(index.tensors[name].dtype for name in group)
    unread = sorted(dtypes - set(source.dtypes))
    if unread:
        raise UnsupportedModelError(
            f"{layer_name}.{source.part} is stored as {unread[0]}; foreroute reads it in {', '.join(source.dtypes)}. "
            "Take a checkpoint whose config.json says how it is quantised, in a format of docs/formats.md."
        )
    if len(dtypes) != 1:
        raise CorruptCheckpointError(f"{layer_name}.{source.part} is stored in several dtypes: {sorted(dtypes)}.")
    (dtype,) = dtypes
    return dtype


def _check_alike(entries: Sequence[TensorEntry]) -> None:
    first = entries[0]
    for entry in entries:
        if entry.shape != first.shape or entry.dtype != first.dtype:
            raise CorruptCheckpointError(
                f"{entry.name} is {entry.dtype} {list(entry.shape)}, "
                f"but {first.name} is {first.dtype} {list(first.shape)}."
            )


def _is_fused(source: PartSource, group: Sequence[str], index: CheckpointIndex) -> bool:
    """Whether one tensor holds all experts."""
    return len(group) == 1 and (bool(source.rows_of_each) or len(index.tensors[group[0]].shape) > len(source.shape))


def _entry(source: PartSource, group: Sequence[str], expert: int, index: CheckpointIndex) -> TensorEntry:
    """The tensor that holds this expert, its last dimensions merged where it has more than the source."""
    if _is_fused(source, group, index):
        entry = index.tensors[group[0]]
        return merged(_by_expert(entry, source.rows_of_each) if source.rows_of_each else entry, len(source.shape) + 1)
    return merged(index.tensors[group[expert]], len(source.shape))


def _by_expert(entry: TensorEntry, rows: int) -> TensorEntry:
    """The tensor as [experts, rows, ...], of [experts * rows, ...]."""
    if not entry.shape or entry.shape[0] % rows:
        raise CorruptCheckpointError(
            f"{entry.name} is {list(entry.shape)}; config.json says {rows} rows for each expert. config.json and the "
            "weights are of different models."
        )
    return replace(entry, shape=(entry.shape[0] // rows, rows, *entry.shape[1:]))


def _assembled(source: PartSource, expert: int, index: CheckpointIndex) -> Assembled:
    inputs = []
    for group in source.groups:
        entry = _entry(source, group, expert, index)
        inputs.append(whole(entry, expert) if _is_fused(source, group, index) else whole(entry))
    return assemble(inputs, source.operations, source.shape)


@dataclass
class ExpertTable:
    """Every expert of a model by its flat key (`layer * num_experts + expert`), with the reads that fill a slot.

    has_one_slot_length: slots are as long for all layers, whatever these store: for engines that know one length only.
    """

    layers: tuple[LayerExperts, ...]
    index: CheckpointIndex
    has_one_slot_length: bool = False
    _reads: dict[int, ExpertReads] = field(default_factory=dict, repr=False)

    @cached_property
    def keys(self) -> ExpertKeys:
        """Conversion between flat keys and (layer, expert)."""
        return ExpertKeys.of([layer.num_experts for layer in self.layers])

    @property
    def num_experts(self) -> int:
        """Experts of the widest layer: the stride of the flat keys."""
        return max(layer.num_experts for layer in self.layers)

    @property
    def num_keys(self) -> int:
        """Number of flat keys, including those of experts that narrower layers lack."""
        return self.num_experts * len(self.layers)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot that holds any expert of the model."""
        return max(layer.layout.slot_bytes for layer in self.layers)

    @cached_property
    def slot_lengths(self) -> tuple[int, ...]:
        """Bytes of a slot, by layer: what its experts take in whole blocks."""
        if self.has_one_slot_length:
            return (self.slot_bytes,) * len(self.layers)
        return tuple(layer.layout.slot_bytes for layer in self.layers)

    @property
    def whole_bytes(self) -> int:
        """Bytes of slots that hold every expert."""
        return sum(layer.num_experts * length for layer, length in zip(self.layers, self.slot_lengths, strict=True))

    @property
    def key_nbytes(self) -> list[int]:
        """Stored bytes of each expert, by flat key; 0 for experts that narrower layers lack."""
        found = [0] * self.num_keys
        for at, layer in enumerate(self.layers):
            first = self.keys.key(at, 0)
            found[first : first + layer.num_experts] = [layer.layout.nbytes] * layer.num_experts
        return found

    @property
    def total_slots(self) -> int:
        """Number of experts: slots that hold the whole model."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def stored_as(self) -> str:
        """The format of a quantised checkpoint's experts; "" for unquantised ones."""
        return next((layer.stored_as for layer in self.layers if layer.stored_as), "")

    @property
    def expert_nbytes(self) -> int:
        """Stored bytes of all experts."""
        return sum(layer.nbytes for layer in self.layers)

    def reordered(self, names: Sequence[str]) -> "ExpertTable":
        """The same experts with the layers in the order of `names`."""
        by_name = {layer.name: layer for layer in self.layers}
        return ExpertTable(tuple(by_name[name] for name in names), self.index, self.has_one_slot_length)

    def expert_id(self, key: int) -> ExpertId:
        """The (layer, expert) pair of a flat key."""
        return self.keys.expert_id(key)

    def label(self, key: int) -> str:
        """A name for messages: the expert, its MoE layer and that layer's module."""
        layer, expert = self.expert_id(key)
        return f"expert {expert} of MoE layer {layer} ({self.layers[layer].name})"

    def reads(self, key: int) -> ExpertReads:
        """The reads that fill a slot with expert `key`, and where their bytes go; computed once per expert."""
        reads = self._reads.get(key)
        if reads is None:
            layer, expert = self.expert_id(key)
            reads = self._reads[key] = expert_reads(self.layers[layer], expert, self.index)
        return reads


def expert_reads(layer: LayerExperts, expert: int, index: CheckpointIndex) -> ExpertReads:
    """The reads for one `expert` of `layer` in `index`'s files: adjacent ranges joined, in file order."""
    moves: list[tuple[str, int, int, Copy]] = []
    for spread in layer.spreads:
        (piece,) = _assembled(spread.source, expert, index).pieces
        moves.append((piece.entry.path, piece.src_offset, spread.copy.nbytes, spread.copy))
    for source, part in zip(layer.sources, layer.layout.parts, strict=True) if not layer.spreads else ():
        strides = row_major_strides((1, *part.shape), part.dtype)
        for piece in _assembled(source, expert, index).pieces:
            for src_offset, copy in _copies(piece, part, strides):
                moves.append((piece.entry.path, src_offset, copy.nbytes, copy))
    moves.sort(key=lambda move: move[:3])
    reads: list[Read] = []
    pending: list[tuple[str, int, int, Copy]] = []
    for move in moves:
        if pending and (move[0] != pending[0][0] or move[1] - _end(pending) > _COALESCE_GAP_BYTES):
            reads.append(_joined(pending))
            pending = []
        pending.append(move)
    reads.append(_joined(pending))
    return tuple(reads)


def _end(moves: Sequence[tuple[str, int, int, Copy]]) -> int:
    return max(src_offset + nbytes for _, src_offset, nbytes, _ in moves)


def _joined(moves: Sequence[tuple[str, int, int, Copy]]) -> Read:
    start = moves[0][1]
    copies = tuple(replace(copy, src_offset=offset - start) for _, offset, _, copy in moves)
    return Read(moves[0][0], start, _end(moves) - start, copies)


def _copies(piece: Piece, part: Part, dst_strides: Sequence[int]) -> list[tuple[int, Copy]]:
    """Split the piece into (file offset, copy) pairs: one if its source is contiguous, else one per source row."""
    itemsize = ITEMSIZE[part.dtype]
    dst_offset = part.offset + sum(start * stride for start, stride in zip(piece.start, dst_strides, strict=True))
    steps = [step * stride for step, stride in zip(piece.step, dst_strides, strict=True)]
    # Walk in the order of the source, so that bytes are read sequentially; the expert dimension (first) is 1.
    axes = sorted(range(1, len(piece.extents)), key=lambda axis: -piece.src_strides[axis])
    if len(axes) > 2:
        raise UnsupportedModelError(f"{piece.entry.name}: an expert's tensor has more than two dimensions.")
    col_axis = axes[-1]
    rows, cols = (piece.extents[axes[0]] if len(axes) == 2 else 1), piece.extents[col_axis]
    src_row_stride = piece.src_strides[axes[0]] if len(axes) == 2 else cols * itemsize
    dst_row_stride = steps[axes[0]] if len(axes) == 2 else cols * itemsize
    if piece.src_strides[col_axis] != itemsize:
        raise UnsupportedModelError(f"{piece.entry.name}: an expert's tensor takes single columns: not known.")
    if src_row_stride == cols * itemsize:
        return [(piece.src_offset, Copy(0, dst_offset, rows, cols, itemsize, dst_row_stride, steps[col_axis]))]
    return [
        (
            piece.src_offset + row * src_row_stride,
            Copy(0, dst_offset + row * dst_row_stride, 1, cols, itemsize, cols * itemsize, steps[col_axis]),
        )
        for row in range(rows)
    ]
