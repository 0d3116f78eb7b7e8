"""Dense weights of a quantised checkpoint, dequantised one tensor at a time for transformers to load.

transformers dequantises too, but not every format on every machine, and not blocks that a matrix truncates (576 rows of
DeepSeek-V3's kv_a_proj_with_mqa). Its renaming and its checks still apply.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foreroute.checkpoint.assembly import Coding, StoredMatrix
from foreroute.checkpoint.index import CheckpointIndex, merged
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.quantised_formats import GPTQ_INT4, GPTQ_REORDERED, MXFP4, QuantisedFormat, read_format
from foreroute.checkpoint.quantised_layout import check_dtypes, matrix_shape
from foreroute.checkpoint.source_files import SourceFile
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError
from foreroute.kernels.torch.dequantise import decode_matrix
from foreroute.model.build.from_state import LazyTensor, read_tensor

# GPTQ's tensor with the group of each column; 4 bytes a column, and read before anything else.
_ORDER = "g_idx"
_ORDER_READERS = 8


class LazyMatrix:
    """A quantised matrix of the checkpoint, in its `coding`; indexing it reads and dequantises its components."""

    def __init__(self, index: CheckpointIndex, names: tuple[str, ...], coding: Coding, dtype: torch.dtype) -> None:
        self._index, self._names, self.coding, self._dtype = index, names, coding, dtype
        self._entries = [merged(self._index.tensors[name], 2) for name in self._names]

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows and columns."""
        return matrix_shape(self.coding, [entry.shape for entry in self._entries], self._names[0])

    def components(self) -> list[torch.Tensor]:
        """Its components as they are stored, in the coding's order."""
        check_dtypes(self.coding, self._names, self._index)
        return [LazyTensor(self._index, entry.name)[...].reshape(entry.shape) for entry in self._entries]

    def __getitem__(self, at: Any) -> torch.Tensor:
        return self.numbers(self._dtype)[at]

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """All of it, dequantised: [out, in]."""
        rows, cols = self.shape
        stored = self.components()
        out = torch.empty(rows, cols, dtype=dtype)
        decode_matrix(StoredMatrix(self.coding, tuple(range(len(stored))), rows, cols), stored, out)
        return out


def dense_state(
    index: CheckpointIndex,
    form: QuantisedFormat,
    matrices: Mapping[str, tuple[str, ...]],
    components: frozenset[str],
    dtype: torch.dtype,
    ignored: Collection[str] = (),
) -> dict[str, Any]:
    """Every tensor of the checkpoint `index` by the model's name, except `ignored`; nothing is read yet.

    Experts are included but never read, as the model has no parameters for them. `form`, `matrices` and `components`
    are those of `quantised_matrices`; `dtype` is that of dequantised numbers.
    """
    state: dict[str, Any] = {name: LazyTensor(index, name) for name in index.tensors if name not in components}
    if form.coding.kind != MXFP4:  # MXFP4 holds experts only
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
    """Extra bytes of the weights outside `table` (the experts) after dequantisation to 16 bit, without the `ignored`.

    `index`, `form`, `matrices`, `components`: as in `dense_state`.
    """
    unread = [name for name in ignored if name in index.tensors and name not in components]
    dequantised = 0
    if form is not None and form.coding.kind != MXFP4:
        unread += components.difference(*matrices.values())  # no matrix uses them
        groups = (group for layer in table.layers for source in layer.sources for group in source.groups)
        of_experts = set(chain.from_iterable(groups))
        for name, names in matrices.items():
            if name in ignored:
                unread += names
            elif names[0] not in of_experts:
                entries = [merged(index.tensors[one], 2) for one in names]
                rows, cols = matrix_shape(form.coding_of(name), [entry.shape for entry in entries], names[0])
                dequantised += 2 * rows * cols - sum(entry.nbytes for entry in entries)
    return dequantised - sum(index.tensors[name].nbytes for name in unread)


def quantised_matrices(
    folder: Path, index: CheckpointIndex
) -> tuple[QuantisedFormat | None, Mapping[str, tuple[str, ...]], frozenset[str]]:
    """Find how `index`'s weights are quantised, by `folder`'s config: format, matrices, stored names of components.

    Returns:
        The format, or None; and what its `split` returns.
    Raises:
        UnsupportedModelError: an unsupported format or variant.
        CheckpointError: the declaration makes no sense, or components are absent or have other dtypes or shapes.
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
        if coding.kind != MXFP4 and len(shapes[0]) == 2:  # fused experts are checked later
            matrix_shape(coding, shapes, names[0])
    return form, matrices, components


def with_order(
    index: CheckpointIndex, form: QuantisedFormat, matrices: Mapping[str, tuple[str, ...]]
) -> QuantisedFormat:
    """Add g_idx to the format's components where GPTQ's columns are not grouped by position.

    The stored g_idx of `index` decides, not desc_act: older writers set it for the ordinary order too.

    Args:
        form, matrices: the declared format, and its `split` of the stored names.
    Raises:
        CorruptCheckpointError: g_idx is absent for declared reordering, or has an invalid group.
    Cost: reads every g_idx (4 bytes per column of each matrix), in a few threads.
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
    """Whether some of these matrices have columns that are not grouped by position.

    Args:
        share: per matrix, file, offset and name of its g_idx, and its name in the model.
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
    """The g_idx of columns grouped by position."""
    return (np.arange(num_columns, dtype="<i4") // max(per_group, 1)).astype("<i4").tobytes()


def idle_biases(index: CheckpointIndex, matrices: Mapping[str, tuple[str, ...]], known: Collection[str]) -> set[str]:
    """All-zero biases of quantised `matrices` in `index` that the model lacks: older writers gave each matrix one.

    Args:
        known: names of the model's tensors. Cost: reads those biases, of all experts too.
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
