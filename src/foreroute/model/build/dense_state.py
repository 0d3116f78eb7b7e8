"""Dense weights of a quantised checkpoint, as transformers shall load them: numbers, made one tensor at a time.

transformers dequantises too, but not every format on every machine, and not blocks that a matrix cuts off (the 576 rows
of DeepSeek-V3's kv_a_proj_with_mqa). What it does to names, and what it refuses, stays its own.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foreroute.checkpoint.index import CheckpointIndex, merged
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.quantised_formats import GPTQ_INT4, GPTQ_REORDERED, MXFP4, QuantisedFormat, read_format
from foreroute.checkpoint.quantised_layout import check_dtypes, matrix_shape
from foreroute.checkpoint.source_files import SourceFile
from foreroute.checkpoint.stored_parts import Coding, StoredMatrix
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError
from foreroute.kernels.torch.dequantise import decode_matrix
from foreroute.model.build.from_state import LazyTensor, read_tensor

# GPTQ's tensor that says which group each column is of; 4 bytes a column, and read before anything else is.
_ORDER = "g_idx"
_ORDER_READERS = 8


class LazyMatrix:
    """A quantised matrix of the checkpoint: its components are read, and made into numbers, when it is indexed."""

    def __init__(self, index: CheckpointIndex, names: tuple[str, ...], coding: Coding, dtype: torch.dtype) -> None:
        self._index, self._names, self._coding, self._dtype = index, names, coding, dtype

    def __getitem__(self, at: Any) -> torch.Tensor:
        check_dtypes(self._coding, self._names, self._index)
        entries = [merged(self._index.tensors[name], 2) for name in self._names]
        rows, cols = matrix_shape(self._coding, [entry.shape for entry in entries], self._names[0])
        matrix = StoredMatrix(self._coding, tuple(range(len(entries))), rows, cols)
        out = torch.empty(rows, cols, dtype=self._dtype)
        stored = [LazyTensor(self._index, entry.name)[...].reshape(entry.shape) for entry in entries]
        decode_matrix(matrix, stored, out)
        return out[at]


def dense_state(
    index: CheckpointIndex,
    form: QuantisedFormat,
    matrices: Mapping[str, tuple[str, ...]],
    components: frozenset[str],
    dtype: torch.dtype,
    ignored: Collection[str] = (),
) -> dict[str, Any]:
    """Every tensor of the checkpoint by the name that the model knows, but for the ignored; nothing is read yet.

    Experts are among them, and never read: the model has no place for them.
    """
    state: dict[str, Any] = {name: LazyTensor(index, name) for name in index.tensors if name not in components}
    if form.coding.kind != MXFP4:  # which holds experts alone
        state |= {name: LazyMatrix(index, names, form.coding_of(name), dtype) for name, names in matrices.items()}
    return {name: tensor for name, tensor in state.items() if name not in ignored}


def dense_growth(
    index: CheckpointIndex,
    form: QuantisedFormat | None,
    matrices: Mapping[str, tuple[str, ...]],
    components: frozenset[str],
    table: ExpertTable,
    ignored: Collection[str] = (),
) -> int:
    """Bytes by which what is not experts grows when it becomes numbers of two bytes; what is ignored goes."""
    growth = -sum(index.tensors[name].nbytes for name in ignored if name in index.tensors and name not in components)
    if form is None or form.coding.kind == MXFP4:
        return growth
    groups = [group for layer in table.layers for source in layer.sources for group in source.groups]
    of_experts = {name for group in groups for name in group}
    # What says nothing here is read by nobody.
    growth -= sum(index.tensors[name].nbytes for name in components.difference(*matrices.values()))
    for name, names in matrices.items():
        if names[0] in of_experts:
            continue
        if name in ignored:
            growth -= sum(index.tensors[one].nbytes for one in names)
        else:
            entries = [merged(index.tensors[one], 2) for one in names]
            rows, cols = matrix_shape(form.coding_of(name), [entry.shape for entry in entries], names[0])
            growth += 2 * rows * cols - sum(entry.nbytes for entry in entries)
    return growth


def quantised_matrices(
    folder: Path, index: CheckpointIndex
) -> tuple[QuantisedFormat | None, Mapping[str, tuple[str, ...]], frozenset[str]]:
    """How the checkpoint's weights are quantised, its quantised matrices, and the stored names that belong to them.

    Returns:
        The format, or None; and what its `split` returns.
    Raises:
        UnsupportedModelError: a format, or a variant of one, that is not read.
        CheckpointError: the declaration makes no sense, or components are absent or of another kind.
    """
    declared = read_format(folder, index)
    if declared is None:
        return None, {}, frozenset()
    matrices, components = declared.split(index)
    form = with_order(index, declared, matrices)
    if form is not declared:
        matrices, components = form.split(index)
    for name, names in matrices.items():
        coding, shapes = form.coding_of(name), [index.tensors[one].shape for one in names]
        check_dtypes(coding, names, index)
        if coding.kind != MXFP4 and len(shapes[0]) == 2:  # of experts in one tensor each is looked at later
            matrix_shape(coding, shapes, names[0])
    return form, matrices, components


def with_order(
    index: CheckpointIndex, form: QuantisedFormat, matrices: Mapping[str, tuple[str, ...]]
) -> QuantisedFormat:
    """The format with g_idx among its components, where GPTQ's columns are of other groups than their neighbours.

    What counts is what is stored, whatever desc_act says: older writers set it where the order is the ordinary one.

    Args:
        form, matrices: as declared, and as it splits the stored names.
    Raises:
        CorruptCheckpointError: g_idx is absent though columns are said to be in another order, or names no group.
    Cost: reads every g_idx (4 bytes per column of each matrix), by a few threads.
    """
    if form.coding.kind != GPTQ_INT4:
        return form
    stored = {name: names[0].removesuffix(form.components[0]) + _ORDER for name, names in matrices.items()}
    absent = min((name for name in stored.values() if name not in index.tensors), default=None)
    if absent is not None and form.needs_order:
        raise CorruptCheckpointError(
            f"{index.folder}: {absent} is not stored, though the columns are said to be in another order (desc_act). "
            "A shard is missing, or the config is of another model."
        )
    there = sorted(
        (index.tensors[order].path, index.tensors[order].offset, order, name)
        for name, order in stored.items()
        if order in index.tensors
    )
    per_reader = -(-len(there) // _ORDER_READERS) or 1
    shares = [there[at : at + per_reader] for at in range(0, len(there), per_reader)]
    with ThreadPoolExecutor(_ORDER_READERS) as pool:
        is_other = list(pool.map(lambda share: _has_reordered(index, form, matrices, share), shares))
    if not any(is_other):
        return form
    coding = replace(form.coding, kind=GPTQ_REORDERED)
    return replace(form, coding=coding, components=(*form.components, _ORDER), optional=())


def _has_reordered(
    index: CheckpointIndex,
    form: QuantisedFormat,
    matrices: Mapping[str, tuple[str, ...]],
    share: Sequence[tuple[str, int, str, str]],
) -> bool:
    """Whether the columns of one of these matrices are of other groups than their neighbours.

    Args:
        share: of each the file, the offset and the name of its g_idx, and its name in the model.
    """
    is_other = False
    for path, of_file in groupby(share, key=lambda one: one[0]):
        with SourceFile(path, index.files.get(path)) as file:
            for _, offset, order, name in of_file:
                entry = index.tensors[order]
                if entry.dtype != "I32" or len(entry.shape) != 1:
                    raise UnsupportedModelError(
                        f"{order} is {entry.dtype} {list(entry.shape)}; foreroute reads a row of I32."
                    )
                stored = bytes(file.read(offset, entry.nbytes))
                if stored == _ordinary(entry.shape[0], form.coding_of(name).block[1] or entry.shape[0]):
                    continue
                is_other = True
                _check_groups(index.folder, order, stored, index.tensors[matrices[name][1]].shape[0])
    return is_other


def _check_groups(folder: Path, order: str, stored: bytes, num_groups: int) -> None:
    groups = np.frombuffer(stored, "<i4")
    if len(groups) and not 0 <= groups.min() <= groups.max() < num_groups:
        raise CorruptCheckpointError(
            f"{folder}: {order} puts columns into groups {groups.min()} to {groups.max()}, of {num_groups}. "
            "The quantiser was at fault, or the file is damaged: download it again."
        )


@lru_cache(maxsize=64)
def _ordinary(num_columns: int, per_group: int) -> bytes:
    """The g_idx of columns whose groups are neighbours."""
    return (np.arange(num_columns, dtype="<i4") // max(per_group, 1)).astype("<i4").tobytes()


def idle_biases(index: CheckpointIndex, matrices: Mapping[str, tuple[str, ...]], known: Collection[str]) -> set[str]:
    """Biases of quantised matrices that are nought, and that the model does not have: older writers gave each one.

    Args:
        known: the model's own tensors. Cost: reads those biases, of all experts too.
    """
    by_file: dict[str, list[str]] = {}
    for name in matrices:
        bias = name.removesuffix("weight") + "bias"
        if bias in index.tensors and bias not in known:
            by_file.setdefault(index.tensors[bias].path, []).append(bias)
    found: set[str] = set()
    for path, biases in by_file.items():
        with SourceFile(path, index.files.get(path)) as file:
            found.update(bias for bias in biases if not read_tensor(file, index.tensors[bias]).any())
    return found
