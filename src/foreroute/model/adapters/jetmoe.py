"""JetMoE: experts in its MLP, which are offloaded, and in its attention, which stay in memory.

An attention expert makes a token's queries before attention and its output after it: between the two its weights would
have to be held, or read twice. They are a small part of the model, and are loaded with the dense part.
"""

from typing import Any

import torch

from foreroute.checkpoint.assembly import FamilyForm
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.model.adapters.block import AdaptedBlock, HeldExperts
from foreroute.model.adapters.matrices import DOWN, GATE_UP, gated_by, linear_expert, shape_of
from foreroute.model.experts import ExpertParameter


class JetMoeBlock(AdaptedBlock):
    """JetMoE's MLP: `input_linear` and `output_linear` hold a matrix [out, in] of every expert."""

    MODULE, BLOCK = "jetmoe", "JetMoeMoE"
    HELD_IN = ("input_linear", "output_linear")

    @staticmethod
    def held(block: Any) -> HeldExperts:
        """See `AdaptedBlock`."""
        gate = gated_by(block.activation)
        parameters = tuple(
            ExpertParameter(name, shape_of(block, f"{child}.weight")[1:], ((f"{child}.weight",),))
            for name, child in zip((GATE_UP, DOWN), JetMoeBlock.HELD_IN, strict=True)
        )
        return HeldExperts(
            block.input_linear.num_experts,
            parameters,
            FamilyForm(gates="halves"),
            ExpertMath(gate, 0, 1, sums_at_once=True),
            linear_expert(gate),
        )

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `AdaptedBlock`."""
        block: Any = self
        logits = block.router.layer(hidden).float()
        best, ids = logits.topk(block.router.top_k, dim=1)
        return logits, torch.softmax(best, dim=1).type_as(hidden), ids

    def forward(self, layer_input: torch.Tensor) -> torch.Tensor:
        """As the family's: [rows, positions, hidden] of the same shape."""
        block: Any = self
        hidden = layer_input.reshape(-1, layer_input.shape[-1])
        _, weights, ids = self.routing(hidden)
        total: torch.Tensor = self.experts(hidden, ids, weights).view(layer_input.shape)
        return total + block.bias
