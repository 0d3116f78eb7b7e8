"""Switch Transformers: a token goes to one expert, and an expert takes as many tokens of a row as its capacity.

The router marks the chosen expert in a row of zeros and ones. Tokens beyond the capacity have zeros alone: they go
through no expert, and keep the residual stream.
"""

from typing import Any

import torch
import torch.nn.functional as F

from foreroute.checkpoint.assembly import FamilyForm
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.model.adapters.block import HeldExperts
from foreroute.model.adapters.capacity import CapacityBlock
from foreroute.model.adapters.matrices import DOWN, UP, linear_expert, of_children

_PARTS = {UP: "wi.weight", DOWN: "wo.weight"}


class SwitchBlock(CapacityBlock):
    """Switch Transformers' block: `experts` has a child for each expert, of two matrices [out, in] without gate."""

    MODULE, BLOCK = "switch_transformers", "SwitchTransformersSparseMLP"

    @staticmethod
    def held(block: Any) -> HeldExperts:
        """See `AdaptedBlock`."""
        act = block.experts["expert_0"].act
        parameters = of_children(block, "experts.expert_{}", block.experts.num_experts, _PARTS)
        return HeldExperts(
            block.experts.num_experts, parameters, FamilyForm(), ExpertMath(act, 0, 1), linear_expert(act)
        )

    def ahead(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `CapacityBlock`."""
        router: Any = self.router
        logits = F.linear(hidden.to(router.dtype), router.classifier.weight.to(router.dtype), router.classifier.bias)
        best = torch.softmax(logits, -1, dtype=router.dtype).to(hidden.dtype).max(-1, keepdim=True)
        return logits, best.values, best.indices

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As the family's: [rows, positions, hidden] of the same shape; capacity counts the tokens of a row."""
        router: Any = self.router
        marked, weights, logits = router(hidden_states)
        none = self.experts.num_offloaded
        ids = marked.argmax(-1).masked_fill(marked.sum(-1) == 0, none).view(-1, 1)
        self.show(hidden_states, logits.flatten(0, 1), weights.view(-1, 1), ids)
        hidden = hidden_states.view(-1, hidden_states.shape[-1])
        return self.experts(hidden, ids, weights.view(-1, 1)).view(hidden_states.shape)
