"""NLLB-MoE: a token goes to two experts, each of which takes a share of the tokens that are computed together.

transformers 5.24 hands its experts a mask of zeros and ones where they expect ids: each token goes through experts 0
and 1, whatever the router chose, and the other experts do nothing. Here tokens go through the experts that the router
chose, as in fairseq, where these models come from, and in transformers 4; gate weights, capacity and the scale
of outputs are transformers' own. So what the model writes differs from what that transformers writes, on purpose.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from foreroute.checkpoint.assembly import FamilyForm
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.model.adapters.block import HeldExperts
from foreroute.model.adapters.capacity import CapacityBlock
from foreroute.model.adapters.matrices import DOWN, UP, of_children

_TOP_K = 2
_PARTS = {UP: "fc1.weight", f"{UP}_bias": "fc1.bias", DOWN: "fc2.weight", f"{DOWN}_bias": "fc2.bias"}


class NllbBlock(CapacityBlock):
    """NLLB-MoE's block: `experts` has a child for each expert, of two linear layers with biases."""

    MODULE, BLOCK = "nllb_moe", "NllbMoeSparseMLP"
    NOTE = (
        "Tokens go through the experts that the router chose; transformers (seen in 5.24) passes them all through "
        "experts 0 and 1, and so writes something else."
    )

    @staticmethod
    def held(block: Any) -> HeldExperts:
        """See `AdaptedBlock`."""
        act, scale = block.experts["expert_0"].act, 1 - block.experts.moe_token_dropout

        def expert(rows: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
            up, up_bias, down, down_bias = parts
            return F.linear(act(F.linear(rows, up, up_bias)), down, down_bias)

        parameters = of_children(block, "experts.expert_{}", block.experts.num_experts, _PARTS)
        math = ExpertMath(act, 0, 2, joined_biases=(1, 3), output_scale=scale)
        return HeldExperts(block.experts.num_experts, parameters, FamilyForm(), math, expert)

    def ahead(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `CapacityBlock`. Draws nothing, also where the family draws whether a token goes to its second expert."""
        router: Any = self.router
        logits = F.linear(hidden.to(router.dtype), router.classifier.weight.to(router.dtype), router.classifier.bias)
        shares = torch.softmax(logits, -1, dtype=router.dtype)
        best = shares.topk(min(_TOP_K, shares.shape[-1]))
        return logits, (best.values / best.values.sum(-1, keepdim=True)).to(hidden.dtype), best.indices

    def forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """As the family's: [rows, positions, hidden] of the same shape; padding_mask: attention's."""
        router: Any = self.router
        hidden = hidden_states.view(-1, hidden_states.shape[-1])
        _, gates, logits = router(hidden, padding_mask)
        weights, ids = gates.topk(min(_TOP_K, gates.shape[-1]))
        ids = ids.masked_fill(weights == 0, self.experts.num_offloaded)
        self.show(hidden, logits, weights, ids)
        return self.experts(hidden, ids, weights).view(hidden_states.shape)
