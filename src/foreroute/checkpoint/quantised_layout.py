"""Lay out experts of a quantised checkpoint: which stored tensors go to a slot, and which family tensors they make."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

from foreroute.checkpoint.assembly import (
    GGUF_PREFIX,
    MXFP4_BLOCK_BYTES,
    MXFP4_IN_BLOCKS,
    Coding,
    StoredMatrix,
    StoredPart,
)
from foreroute.checkpoint.index import ITEMSIZE, CheckpointIndex
from foreroute.checkpoint.layouts import ExpertTable, LayerExperts, PartSource, Placing, Spread, layer_experts
from foreroute.checkpoint.quantised_formats import (
    AWQ_INT4,
    FP8,
    FP8_SCALED,
    GPTQ_INT4,
    GPTQ_REORDERED,
    MXFP4,
    PACKED_INT4,
    QuantisedFormat,
)
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError
from foreroute.types import Copy

_FLOATS = ("F32", "F16", "BF16")
# Per coding, the dtypes that each component may have.
_DTYPES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    MXFP4: (("U8",), ("U8",)),
    FP8: (("F8_E4M3",), _FLOATS),
    FP8_SCALED: (("F8_E4M3",), _FLOATS),
    PACKED_INT4: (("I32",), _FLOATS),
    GPTQ_INT4: (("I32",), _FLOATS, ("I32",)),
    GPTQ_REORDERED: (("I32",), _FLOATS, ("I32",), ("I32",)),
    AWQ_INT4: (("I32",), _FLOATS, ("I32",)),
}
_PER_WORD = 8  # four-bit integers in an I32
_MXFP4_GROUP = 32


def quantised_layer(
    name: str,
    num_experts: int,
    sources: Sequence[PartSource],
    index: CheckpointIndex,
    form: QuantisedFormat | None,
    matrices: Mapping[str, tuple[str, ...]],
) -> LayerExperts:
    """Lay out one layer's experts as they are stored; the counterpart of `layer_experts` for a quantised checkpoint.

    Args:
        name, num_experts: of the layer. sources: of the family's tensors, by the model's names. index: of the
            checkpoint. form: its format, if declared. matrices: stored names of each quantised matrix's components.
    Raises:
        CorruptCheckpointError: a tensor is absent, or has another shape or dtype than its peers or the model.
        UnsupportedModelError: a matrix is assembled in an unknown way.
    """
    if form is None or not any(group and group[0] in matrices for source in sources for group in source.groups):
        return layer_experts(name, num_experts, sources, index)
    stored: list[PartSource] = []
    parts: list[StoredPart] = []
    for source in sources:
        if all(group and group[0] in matrices for group in source.groups):
            made = [
                _components(source, at, group, form, matrices, index, num_experts)
                for at, group in enumerate(source.groups)
            ]
            codings = [_coding_of(form, group) for group in source.groups]
            parts.append(_part(source, form, made, codings, len(stored)))
            stored.extend(chain.from_iterable(made))
        elif any(one in matrices for group in source.groups for one in group):
            raise UnsupportedModelError(
                f"{name}.{source.part} is quantised in parts only: not known. Please report the model."
            )
        else:
            parts.append(StoredPart(source.part, source.shape, at=len(stored)))
            stored.append(source)
    laid = layer_experts(name, num_experts, stored, index)
    return LayerExperts(name, num_experts, laid.layout, laid.sources, parts=tuple(parts), stored_as=form.name)


def _coding_of(form: QuantisedFormat, group: Sequence[str]) -> Coding:
    """The coding of a matrix, the same for all experts."""
    codings = {form.coding_of(name): name for name in group}
    if len(codings) > 1:
        one, other = list(codings.values())[:2]
        raise UnsupportedModelError(
            f"{one} and {other} are quantised with other settings (rules for single modules): experts of one layer "
            "that differ are not read. Take a checkpoint without such rules."
        )
    return next(iter(codings))


def _components(
    source: PartSource,
    group_at: int,
    group: Sequence[str],
    form: QuantisedFormat,
    matrices: Mapping[str, tuple[str, ...]],
    index: CheckpointIndex,
    num_experts: int,
) -> list[PartSource]:
    """One source per component of a matrix, for all experts."""
    absent = [one for one in group if one not in matrices]
    if absent:
        raise CorruptCheckpointError(f"{absent[0]} is not quantised as {group[0]} is, or its scales are absent.")
    made = []
    for at, (suffix, dtypes) in enumerate(zip(form.components, _DTYPES[form.coding.kind], strict=True)):
        names = tuple(matrices[one][at] for one in group)
        first = index.tensors[matrices[group[0]][0]]
        is_fused = len(group) == 1 and len(first.shape) > (3 if form.coding.kind == MXFP4 else 2)
        if is_fused and index.tensors[names[0]].shape[:1] != (num_experts,):
            raise CorruptCheckpointError(
                f"{names[0]} stores {index.tensors[names[0]].shape[:1]} experts, config.json says {num_experts}."
            )
        shape = index.tensors[names[0]].shape[1 if is_fused else 0 :] or (1,)
        shape = (shape[0], math.prod(shape[1:])) if len(shape) > 2 else shape
        made.append(PartSource(f"{source.part}.{group_at}.{suffix.strip('._')}", shape, (names,), dtypes=dtypes))
    return made


def _part(
    source: PartSource,
    form: QuantisedFormat,
    made: Sequence[Sequence[PartSource]],
    codings: Sequence[Coding],
    first_at: int,
) -> StoredPart:
    matrices = []
    for components, coding in zip(made, codings, strict=True):
        rows, cols = matrix_shape(coding, [component.shape for component in components], components[0].groups[0][0])
        matrices.append(StoredMatrix(coding, tuple(range(first_at, first_at + len(components))), rows, cols))
        first_at += len(components)
    is_transposed = form.is_transposed != _is_transposed(source, len(made))
    rows, cols = sum(matrix.rows for matrix in matrices), matrices[0].cols
    shape = (cols, rows) if is_transposed else (rows, cols)
    if shape != source.shape or any(matrix.cols != cols for matrix in matrices):
        raise CorruptCheckpointError(
            f"{made[0][0].groups[0][0]}: an expert's stored shape is {list(shape)}, the config says "
            f"{list(source.shape)}. config.json and the weights are of different models."
        )
    return StoredPart(source.part, source.shape, tuple(matrices), is_transposed=is_transposed)


def _is_transposed(source: PartSource, num_matrices: int) -> bool:
    """Whether transformers transposes the matrices after stacking their rows."""
    steps = [(op.kind, op.dim, op.other_dim) for op in source.operations if op.kind != "MergeModulelist"]
    if num_matrices > 1:
        if not steps or steps[0][:2] != ("Concatenate", 1):
            raise UnsupportedModelError(f"{source.part}: quantised matrices that are joined otherwise: not known.")
        steps = steps[1:]
    elif steps and steps[0][0] == "Concatenate":
        steps = steps[1:]
    if not steps:
        return False
    if len(steps) == 1 and steps[0][0] == "Transpose" and {steps[0][1], steps[0][2]} == {1, 2}:
        return True
    raise UnsupportedModelError(
        f"{source.part}: quantised experts that need transformers' {steps[0][0]} are not known. "
        "Please report the model."
    )


def matrix_shape(coding: Coding, shapes: Sequence[tuple[int, ...]], name: str) -> tuple[int, int]:
    """Rows and columns of the matrix `name` in this `coding`, from its components' `shapes`.

    Raises:
        CorruptCheckpointError: the shapes do not fit each other.
    """
    first, scales = shapes[0], shapes[1]
    rows, cols = first if len(first) == 2 else (0, 0)
    fits = False
    if not rows or not cols:
        pass
    elif coding.kind == MXFP4:
        cols *= 2
        fits = cols % _MXFP4_GROUP == 0 and scales == (rows, cols // _MXFP4_GROUP)
    elif coding.kind == FP8:
        fits = scales == (-(-rows // coding.block[0]), -(-cols // coding.block[1]))
    elif coding.kind == FP8_SCALED:
        fits = scales in _scale_shapes(coding, rows, cols)
    elif coding.kind == PACKED_INT4:
        cols *= _PER_WORD
        fits = scales == (rows, _num_groups(coding, cols, name))
    elif coding.kind in (GPTQ_INT4, GPTQ_REORDERED, AWQ_INT4):
        rows, cols = (cols * _PER_WORD, rows) if coding.kind == AWQ_INT4 else (cols, rows * _PER_WORD)
        num_groups = _num_groups(coding, cols, name)
        order = [(cols,)] if coding.kind == GPTQ_REORDERED else []
        fits = list(shapes[1:]) == [(num_groups, rows), (num_groups, rows // _PER_WORD), *order]
    if not fits:
        told = " and ".join(str(list(shape)) for shape in shapes)
        raise CorruptCheckpointError(f"{name}: its components' shapes, {told}, do not fit each other as {coding.kind}.")
    return rows, cols


def _scale_shapes(coding: Coding, rows: int, cols: int) -> tuple[tuple[int, ...], ...]:
    """Allowed shapes of block scales; a block of 0 rows or columns covers all of them."""
    grid = (-(-rows // (coding.block[0] or rows)), -(-cols // (coding.block[1] or cols)))
    return grid, (rows,) if coding.block[0] == 1 else (1,)


def _num_groups(coding: Coding, cols: int, name: str) -> int:
    """Groups per row.

    GPTQ computes a column's group by division, so that the last group may be shorter, and one longer than the row is
    the row; the others need whole groups, and write -1 for the row.
    """
    group = coding.block[1] or cols
    # Eight of GPTQ's columns share one word, and are decoded together.
    misfit = {GPTQ_INT4: min(group, cols) % _PER_WORD, GPTQ_REORDERED: 0}.get(coding.kind, cols % group)
    if misfit:
        raise CorruptCheckpointError(
            f"{name}: config.json's group_size {coding.block[1]} does not do for its {cols} columns. config.json and "
            "the weights are of different models, or the quantiser was at fault."
        )
    return -(-cols // group)


def check_dtypes(coding: Coding, names: Sequence[str], index: CheckpointIndex) -> None:
    """Check that the matrix's components (`names` in `index`) are stored in dtypes that its `coding` allows.

    Raises:
        UnsupportedModelError: one is not; named.
    """
    for name, dtypes in zip(names, _DTYPES[coding.kind], strict=True):
        if index.tensors[name].dtype not in dtypes:
            raise UnsupportedModelError(
                f"{name} is stored as {index.tensors[name].dtype}; in {coding.kind} foreroute reads it in "
                f"{', '.join(dtypes)}."
            )


def in_blocks(table: ExpertTable) -> ExpertTable:
    """The experts of `table` with those in Hugging Face's MXFP4 laid out in blocks that ggml's kernels multiply.

    A file has an expert's four-bit floats in one tensor and their exponents in another; ggml has an exponent and the 32
    floats that share it side by side, 17 bytes. Only where bytes lie in a slot, or a packed record, changes: they are
    spread while they are copied there. The order within the 16 bytes stays: kernels/ggml reorders activations in its
    place. Biases of gate and up, which alternate in the file, are taken apart.

    Returns:
        `table` itself where no expert is in MXFP4.
    """
    layers = tuple(_layer_in_blocks(layer) for layer in table.layers)
    return table if layers == table.layers else replace(table, layers=layers, _reads={})


def _layer_in_blocks(layer: LayerExperts) -> LayerExperts:
    plain = [layer.sources[part.at] for part in layer.parts if not part.matrices]
    is_mxfp4 = any(matrix.coding.kind == MXFP4 for part in layer.parts for matrix in part.matrices)
    if not is_mxfp4 or any(source.operations for source in plain):
        return layer
    made = _Made()
    for part in layer.parts:
        if part.matrices:
            _add_blocks(made, layer, part)
        else:
            _add_bias(made, layer, part)
    return replace(layer, layout=made.placing.layout, parts=tuple(made.family), spreads=tuple(made.spreads))


class _Made:
    """What has been laid out so far: parts of the slot, the family's tensors, and where bytes go."""

    def __init__(self) -> None:
        self.placing = Placing()
        self.family: list[StoredPart] = []
        self.spreads: list[Spread] = []

    def add(self, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """Lay out the next stored part, of bytes; return its position, and where it begins."""
        at = self.placing.add(name, shape, "U8")
        return at, self.placing.parts[at].offset


def _add_blocks(made: _Made, layer: LayerExperts, part: StoredPart) -> None:
    matrices = []
    for matrix in part.matrices:
        assert matrix.coding.kind == MXFP4, "a checkpoint has one format"
        blocks, exponents = (layer.sources[at] for at in matrix.at)
        per_row = matrix.cols // _MXFP4_GROUP
        num_blocks, data_bytes = matrix.rows * per_row, MXFP4_BLOCK_BYTES - 1
        at, start = made.add(blocks.part, (matrix.rows, per_row * MXFP4_BLOCK_BYTES))
        matrices.append(replace(matrix, coding=Coding(MXFP4_IN_BLOCKS), at=(at,)))
        for source, offset, nbytes in ((blocks, 1, data_bytes), (exponents, 0, 1)):
            made.spreads.append(Spread(source, Copy(0, start + offset, 1, num_blocks, nbytes, 0, MXFP4_BLOCK_BYTES)))
    made.family.append(replace(part, matrices=tuple(matrices)))


def _add_bias(made: _Made, layer: LayerExperts, part: StoredPart) -> None:
    """Lay out a bias: alternating numbers of gate and up one after the other, any other as it is, all in order."""
    source, dtype = layer.sources[part.at], layer.layout.parts[part.at].dtype
    itemsize, count = ITEMSIZE[dtype], math.prod(part.shape)
    num_matrices = 2 if part.name.startswith("gate_up_proj") else 1
    rows = count // num_matrices
    starts = []
    matrices = []
    for which in range(num_matrices):
        at, start = made.add(f"{part.name}.{which}", (rows, itemsize))
        starts.append(start)
        matrices.append(StoredMatrix(Coding(GGUF_PREFIX + dtype), (at,), rows, 1))
    step = starts[-1] - starts[0] or itemsize
    made.spreads.append(Spread(source, Copy(0, starts[0], rows, num_matrices, itemsize, itemsize, step)))
    made.family.append(replace(part, at=-1, matrices=tuple(matrices), is_interleaved=num_matrices > 1))
