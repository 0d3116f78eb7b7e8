"""LongCat-Flash: some of the experts that its router chooses from have no weights and give their input back."""

from typing import Any

import torch

from foreroute.checkpoint.assembly import FamilyForm
from foreroute.errors import UnsupportedModelError
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.model.adapters.block import AdaptedBlock, HeldExperts
from foreroute.model.adapters.matrices import DOWN, GATE_UP, gated_by, linear_expert, shape_of
from foreroute.model.experts import ExpertParameter


class LongcatBlock(AdaptedBlock):
    """LongCat-Flash's block: experts that compute nothing come behind those with weights."""

    MODULE, BLOCK = "longcat_flash", "LongcatFlashMoE"

    @staticmethod
    def held(block: Any) -> HeldExperts:
        """See `AdaptedBlock`."""
        most = block.experts.total_experts
        count = block.experts.num_routed_experts
        if count < 1:
            raise UnsupportedModelError("This LongCat-Flash has no experts with weights: there is nothing to offload.")
        gate = gated_by(block.experts.act_fn)
        parameters = tuple(
            ExpertParameter(
                # transformers allocates, and so saves, the first matrix of experts that it never multiplies.
                name,
                shape_of(block, f"experts.{name}")[1:],
                ((f"experts.{name}",),),
                most_stored=most,
            )
            for name in (GATE_UP, DOWN)
        )
        return HeldExperts(count, parameters, FamilyForm(gates="halves"), ExpertMath(gate, 0, 1), linear_expert(gate))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As the family's: [rows, positions, hidden] of the same shape."""
        block: Any = self
        *_, weights, ids = block.router(hidden_states)  # older code returns no logits before them
        hidden = hidden_states.view(-1, hidden_states.shape[-1])
        total = self.experts(hidden, ids, weights)
        ids, order = ids.sort(dim=-1)
        weights = weights.gather(-1, order).masked_fill(ids < self.experts.num_offloaded, 0)
        # Behind the others, in ascending order: each sum is rounded.
        for position in range(ids.shape[-1]):
            total.add_((hidden * weights[:, position, None]).to(total.dtype))
        return total.view(hidden_states.shape)
