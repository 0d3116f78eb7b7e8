"""DBRX: every expert's matrices in one tensor, those of all experts one above the other."""

from collections.abc import Sequence
from typing import Any

import torch

from foreroute.checkpoint.assembly import FamilyForm
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.model.adapters.block import AdaptedBlock, HeldExperts
from foreroute.model.adapters.matrices import DOWN, GATE_UP, STACKED, gated_by
from foreroute.model.experts import ExpertParameter


class DbrxBlock(AdaptedBlock):
    """DBRX's block: `w1` and `v1` are gate and up [out, in], `w2` is down as [in, out]."""

    MODULE, BLOCK = "dbrx", "DbrxFFN"

    @staticmethod
    def held(block: Any) -> HeldExperts:
        """See `AdaptedBlock`."""
        experts, inside = block.experts, block.experts.mlp
        rows, width = inside.ffn_hidden_size, inside.hidden_size
        activation = inside.activation_fn

        def expert(x: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
            gate_up, down = parts
            gate, up = gate_up[:rows], gate_up[rows:]
            return (activation(x.matmul(gate.T)) * x.matmul(up.T)).matmul(down)

        parameters = (
            ExpertParameter(GATE_UP, (2 * rows, width), (("experts.mlp.w1",), ("experts.mlp.v1",)), (STACKED,)),
            ExpertParameter(DOWN, (rows, width), (("experts.mlp.w2",),)),
        )
        return HeldExperts(
            experts.num_experts,
            parameters,
            FamilyForm(gates="halves", is_down_transposed=True),
            ExpertMath(gated_by(activation, is_apart=True), 0, 1, is_down_transposed=True, multiplies_halves=True),
            expert,
        )

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `AdaptedBlock`."""
        block: Any = self
        logits = block.router(hidden)
        return (logits, *block.route_tokens_to_experts(logits))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As the family's: [rows, positions, hidden] of the same shape."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, ids = self.routing(hidden)
        return self.experts(hidden, ids, weights).view(hidden_states.shape)
