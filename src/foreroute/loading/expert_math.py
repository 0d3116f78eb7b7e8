"""Choose how each layer's experts are computed: by our kernels if they equal the family's bit for bit, else by these.

Stored tensors may be the family's, or quantised: by `foreroute pack --quant`, or as the checkpoint was
published (kernels/torch/dequantise.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.kernels.ggml.form import BlockForm, form_of, is_in_blocks
from foreroute.kernels.ggml.library import Library
from foreroute.kernels.torch.dequantise import Workspaces, dequantising
from foreroute.kernels.torch.experts import ExpertMath, Operands
from foreroute.kernels.torch.layer import FamilyForward
from foreroute.loading.math_check import describe_math, prove_math, run_family_forward
from foreroute.model.blocks import MoeLayer


def math_of_layers(
    layers: Sequence[MoeLayer],
    table: ExpertTable,
    dtype: torch.dtype,
    forms: Sequence[BlockForm | None],
) -> list[ExpertMath | None]:
    """Return per layer our kernels; None where they are not proven equal, so that the family's own forward runs.

    Args:
        table: the experts as they are read. dtype: the compute dtype. forms: where ggml computes a layer:
            it needs no proof, as its numbers are not the family's bits.
    """
    proven: dict[Any, bool] = {}
    workspaces = Workspaces()
    made: list[ExpertMath | None] = []
    for layer, described_layer, form in zip(layers, table.layers, forms, strict=True):
        if form is not None:
            made.append(dequantising(describe_math(layer.experts), described_layer.parts, dtype, workspaces))
            continue
        kind = (type(layer.experts), described_layer.layout)
        if kind not in proven:
            proven[kind] = prove_math(layer.experts, described_layer.family_layout, dtype)
        entry = describe_math(layer.experts) if proven[kind] else None
        if entry is not None and described_layer.parts:
            entry = dequantising(entry, described_layer.parts, dtype, workspaces)
        made.append(entry)
    return made


def forms_of_layers(
    layers: Sequence[MoeLayer], table: ExpertTable, library: Library | None
) -> tuple[list[BlockForm | None], str]:
    """Per layer how ggml reads its experts in a slot, None where torch computes them; and why one of them has none.

    Args:
        table: the experts as they are read.
    """
    if library is None:
        return [None] * len(layers), ""
    found = [
        form_of(stored, describe_math(layer.experts), library)
        for layer, stored in zip(layers, table.layers, strict=True)
    ]
    refused = (
        f"{layer.name}: {form}"
        for layer, stored, form in zip(layers, table.layers, found, strict=True)
        if isinstance(form, str) and is_in_blocks(stored)
    )
    reason = next(refused, "")
    return [None if isinstance(form, str) else form for form in found], reason


def stored_operands(
    math: Sequence[ExpertMath | None], table: ExpertTable, dtype: torch.dtype
) -> list[ExpertMath | None]:
    """Return how each layer's operands are viewed in a slot: by our kernels, or as stored where there are none."""
    return [
        dequantising(None, layer.parts, dtype, Workspaces()) if entry is None and layer.parts else entry
        for entry, layer in zip(math, table.layers, strict=True)
    ]


def family_forward_over(layers: Sequence[MoeLayer], table: ExpertTable, dtype: torch.dtype) -> list[FamilyForward]:
    """Return per layer the family's own forward over streamed experts, for `layers` without our kernels."""
    workspaces = Workspaces()
    return [_lending(layer, table, dtype, workspaces) for layer in layers]


def _lending(layer: MoeLayer, table: ExpertTable, dtype: torch.dtype, workspaces: Workspaces) -> FamilyForward:
    base = table.keys.key(layer.index, 0)
    parts = table.layers[layer.index].parts
    making = dequantising(None, parts, dtype, workspaces) if parts else None

    def forward(
        operands_of: Callable[[int], Operands], hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        made: dict[int, Operands] = {}

        def parts_of(expert: int) -> Operands:
            if making is None:
                return operands_of(base + expert)
            if expert not in made:
                made.clear()  # one at a time: the family asks for one part after the other
                made[expert] = making.family_parts(operands_of(base + expert))
            return made[expert]

        return run_family_forward(layer.experts, parts_of, hidden, ids, weights)

    return forward
