"""Choose how each layer's experts are computed: by our kernels if they equal the family's bit for bit, else by these.

Stored tensors may be the family's, or quantised: by `foreroute pack --quant`, or as the checkpoint was
published (kernels/torch/dequantise.py).

Our kernels are compared with the family's own forward at load, on random numbers of the real shapes. Families differ in
small ways: a linear with bias or a product and a sum, the order of gating. A layer whose bits differ runs the family's
own forward over streamed experts, which is right by construction, and slower.
"""

import math as scalar_math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from foreroute.checkpoint.layouts import ExpertLayout, ExpertTable
from foreroute.kernels.ggml.form import BlockForm, form_of, is_in_blocks
from foreroute.kernels.ggml.library import Library
from foreroute.kernels.torch.dequantise import Workspaces, dequantising
from foreroute.kernels.torch.experts import ExpertMath, OneToken, Operands, compute_several
from foreroute.kernels.torch.layer import FamilyForward
from foreroute.model.adapters.block import AdaptedExperts
from foreroute.model.blocks import MoeLayer
from foreroute.model.experts import OffloadedExperts, family_forward


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
        form_of(stored, _apart(describe_math(layer.experts)), library)
        for layer, stored in zip(layers, table.layers, strict=True)
    ]
    refused = (
        f"{layer.name}: {form}"
        for layer, stored, form in zip(layers, table.layers, found, strict=True)
        if isinstance(form, str) and is_in_blocks(stored)
    )
    reason = next(refused, "")
    return [None if isinstance(form, str) else form for form in found], reason


def _apart(math: ExpertMath | None) -> ExpertMath | None:
    return None if math is None else math.with_own_biases


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


class _Lent:
    """Replaces a fused parameter in the family's forward; indexing it returns one expert's tensor."""

    def __init__(self, parts_of: Callable[[int], Sequence[torch.Tensor]], part_at: int) -> None:
        self._parts_of = parts_of
        self._part_at = part_at

    def __getitem__(self, expert: torch.Tensor | int) -> torch.Tensor:
        return self._parts_of(int(expert))[self._part_at]


def run_family_forward(
    module: OffloadedExperts,
    parts_of: Callable[[int], Sequence[torch.Tensor]],
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Run the family's own eager forward with one expert's tensors at a time.

    Args:
        parts_of: expert index -> its parts in layout order; called for experts in ascending order.
    """
    if isinstance(module, AdaptedExperts):
        return module.eager_sum(parts_of, hidden, ids, weights)
    for at, parameter in enumerate(module.expert_parameters):
        # In the instance's own table: nn.Module looks there first, and would refuse it as a parameter.
        module.__dict__[parameter.name] = _Lent(parts_of, at)
    try:
        return family_forward(module)(module, hidden, ids, weights)
    finally:
        for parameter in module.expert_parameters:
            del module.__dict__[parameter.name]


def describe_math(module: OffloadedExperts) -> ExpertMath | None:
    """Describe the family's maths: by its adapter, or the flags of transformers' decorator; None where neither can."""
    if isinstance(module, AdaptedExperts):
        return module.held.math
    at = {parameter.name: position for position, parameter in enumerate(module.expert_parameters)}
    flags: Any = module  # set by transformers' decorator
    has_gate = bool(flags.has_gate)
    up_name = "gate_up_proj" if has_gate else "up_proj"
    known = {up_name, "down_proj", f"{up_name}_bias", "down_proj_bias"}
    # has_post_expert_norm is newer than transformers 5.17.
    has_norm = bool(getattr(flags, "has_post_expert_norm", False))
    if up_name not in at or "down_proj" not in at or not set(at) <= known or has_norm:
        return None
    gate: Callable[[torch.Tensor], torch.Tensor] = flags._apply_gate if has_gate else flags.act_fn
    return ExpertMath(
        gate,
        at[up_name],
        at["down_proj"],
        at.get(f"{up_name}_bias", -1),
        at.get("down_proj_bias", -1),
        bool(flags.is_transposed),
    )


def prove_math(module: OffloadedExperts, layout: ExpertLayout, compute_dtype: torch.dtype) -> bool:
    """Whether our kernels for this experts module give the bits of the family's own forward.

    Tried as the engine computes: three tokens with one expert, one token with three, and several experts for different
    rows. Random numbers of the real shapes; one expert's tensors are used for all experts.
    """
    math = describe_math(module)
    if math is None:
        return False
    generator = torch.Generator().manual_seed(0)
    parts = []
    for part in layout.parts:
        scale = 1 / scalar_math.sqrt(part.shape[-1])
        parts.append((torch.randn(part.shape, generator=generator, dtype=torch.float32) * scale).to(compute_dtype))
    operands = math.operands(parts)
    up_width, hidden_width = math.widths([part.shape for part in layout.parts])
    num_experts = min(3, module.num_offloaded)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(compute_dtype)

    def theirs(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return run_family_forward(module, lambda _: parts, hidden, ids, weights)

    with torch.no_grad():
        rows, row_weights = random(3, hidden_width), random(3, 1)
        out = math.weigh(math(rows, operands), row_weights).to(compute_dtype)
        if not torch.equal(
            theirs(rows, torch.zeros(3, 1, dtype=torch.int64), row_weights), torch.zeros_like(out) + out
        ):
            return False
        parted = [rows[:1].clone(), rows[1:].clone()]
        together = compute_several(math, parted, [operands] * 2)
        if not all(torch.equal(out, math(some, operands)) for out, some in zip(together, parted, strict=True)):
            return False
        token, weights = random(1, hidden_width), random(1, num_experts)
        routed = list(range(num_experts))
        workspace = OneToken(num_experts, up_width, hidden_width, compute_dtype)
        workspace.begin(routed)
        workspace.run(math, token, routed, [operands] * num_experts)
        return torch.equal(theirs(token, torch.tensor([routed]), weights), workspace.total(weights))
