"""Dense weights of a quantised checkpoint, as transformers shall load them: numbers, made one tensor at a time.

transformers dequantises too, but not every format on every machine, and not blocks that a matrix cuts off (the 576 rows
of DeepSeek-V3's kv_a_proj_with_mqa). What it does to names, and what it refuses, stays its own.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from safetensors import safe_open

from foreroute.checkpoint.index import CheckpointIndex, merged
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.quantised_formats import MXFP4, QuantisedFormat
from foreroute.checkpoint.quantised_layout import check_dtypes, matrix_shape
from foreroute.checkpoint.stored_parts import StoredMatrix
from foreroute.errors import UnsupportedModelError
from foreroute.kernels.torch.dequantise import decode_matrix


class LazyTensor:
    """A tensor of the checkpoint that is read when it is indexed; transformers takes it for a slice of safetensors."""

    def __init__(self, index: CheckpointIndex, name: str) -> None:
        self._index = index
        self._name = name

    def __getitem__(self, at: Any) -> torch.Tensor:
        return _read(self._index, self._name)[at]


class LazyMatrix:
    """A quantised matrix of the checkpoint: its components are read, and made into numbers, when it is indexed."""

    def __init__(
        self, index: CheckpointIndex, names: tuple[str, ...], form: QuantisedFormat, dtype: torch.dtype
    ) -> None:
        self._index, self._names, self._form, self._dtype = index, names, form, dtype

    def __getitem__(self, at: Any) -> torch.Tensor:
        check_dtypes(self._form.coding, self._names, self._index)
        entries = [merged(self._index.tensors[name], 2) for name in self._names]
        rows, cols = matrix_shape(self._form.coding, [entry.shape for entry in entries], self._names[0])
        matrix = StoredMatrix(self._form.coding, tuple(range(len(entries))), rows, cols)
        out = torch.empty(rows, cols, dtype=self._dtype)
        stored = [_read(self._index, entry.name).reshape(entry.shape) for entry in entries]
        decode_matrix(matrix, stored, out)
        return out[at]


def dense_state(
    index: CheckpointIndex,
    form: QuantisedFormat,
    matrices: Mapping[str, tuple[str, ...]],
    components: frozenset[str],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Every tensor of the checkpoint by the name that the model knows; nothing is read yet.

    Experts are among them, and never read: the model has no place for them.
    """
    state: dict[str, Any] = {name: LazyTensor(index, name) for name in index.tensors if name not in components}
    if form.coding.kind != MXFP4:  # which holds experts alone
        state |= {name: LazyMatrix(index, names, form, dtype) for name, names in matrices.items()}
    return state


def dense_growth(
    index: CheckpointIndex,
    form: QuantisedFormat | None,
    matrices: Mapping[str, tuple[str, ...]],
    components: frozenset[str],
    table: ExpertTable,
) -> int:
    """Bytes by which what is not experts grows when it becomes numbers of two bytes."""
    if form is None or form.coding.kind == MXFP4:
        return 0
    groups = [group for layer in table.layers for source in layer.sources for group in source.groups]
    of_experts = {name for group in groups for name in group}
    # What says nothing here is read by nobody.
    growth = -sum(index.tensors[name].nbytes for name in components.difference(*matrices.values()))
    for name, names in matrices.items():
        if names[0] in of_experts:
            continue
        if ".experts." in name:
            # Of a layer that the model has no place for, as DeepSeek-V3's last: not loaded.
            growth -= sum(index.tensors[one].nbytes for one in names)
        else:
            entries = [merged(index.tensors[one], 2) for one in names]
            rows, cols = matrix_shape(form.coding, [entry.shape for entry in entries], names[0])
            growth += 2 * rows * cols - sum(entry.nbytes for entry in entries)
    return growth


def check_order(index: CheckpointIndex, form: QuantisedFormat, components: frozenset[str]) -> None:
    """See that GPTQ's groups are of neighbouring inputs, as no desc_act declares; one matrix speaks for all.

    Raises:
        UnsupportedModelError: they are not.
    """
    name = min((one for one in components if one.endswith("g_idx")), default=None)
    if name is None:
        return
    groups = _read(index, name)
    if not torch.equal(groups, torch.arange(len(groups), dtype=groups.dtype) // (form.coding.block[1] or len(groups))):
        raise UnsupportedModelError(
            f"{index.folder}: {name} puts the columns in another order (desc_act), which is not read, and config.json "
            "does not say so."
        )


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
        with safe_open(path, framework="pt") as file:
            found.update(bias for bias in biases if not file.get_tensor(bias).any())
    return found


def _read(index: CheckpointIndex, name: str) -> torch.Tensor:
    with safe_open(index.tensors[name].path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor
