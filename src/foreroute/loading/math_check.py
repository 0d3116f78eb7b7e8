"""Compare our kernels with the family's own forward at load, bit for bit, on random numbers of the real shapes.

Families differ in small ways: a linear with bias or a product and a sum, the order of gating. A layer whose bits differ
runs the family's own forward over streamed experts, which is right by construction, and slower.
"""

import math as scalar_math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from foreroute.checkpoint.layouts import ExpertLayout
from foreroute.kernels.torch.experts import ExpertMath, OneToken, compute_several
from foreroute.model.experts import OffloadedExperts, family_forward


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
    for at, parameter in enumerate(module.expert_parameters):
        # In the instance's own table: nn.Module looks there first, and would refuse it as a parameter.
        module.__dict__[parameter.name] = _Lent(parts_of, at)
    try:
        return family_forward(module)(module, hidden, ids, weights)
    finally:
        for parameter in module.expert_parameters:
            del module.__dict__[parameter.name]


def describe_math(module: OffloadedExperts) -> ExpertMath | None:
    """Describe the family's maths by the flags of transformers' decorator on the module; None without them."""
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
        out = (math(rows, operands) * row_weights).to(compute_dtype)
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
