"""Llama 4: one routed expert beside a shared one.

transformers multiplies every expert with every token, those that a token does not choose with zeros, and adds all of
them. A zero row stays zero and adds nothing, so that the chosen expert alone gives the sum; the routed token is scaled
by its gate's sigmoid before its expert, so that the sum has no gate weights.
"""

from collections.abc import Sequence
from typing import Any

import torch

from foreroute.checkpoint.assembly import FamilyForm
from foreroute.errors import UnsupportedModelError
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.model.adapters.block import AdaptedBlock, HeldExperts
from foreroute.model.adapters.matrices import DOWN, GATE_UP, gated_by, shape_of
from foreroute.model.experts import ExpertParameter


class Llama4Block(AdaptedBlock):
    """The block of Llama 4's text model: `router`, `shared_expert`, and experts as two 3-D parameters [E, in, out]."""

    MODULE, BLOCK = "llama4", "Llama4TextMoe"
    # Published models have a vision tower; the class that generates from text has none.
    UNREAD = (r"(^|\.)vision_model\.", r"(^|\.)multi_modal_projector\.")

    @staticmethod
    def held(block: Any) -> HeldExperts:
        """See `AdaptedBlock`."""
        if block.top_k != 1:
            raise UnsupportedModelError(
                f"Llama 4 with num_experts_per_tok {block.top_k}: a token's experts get inputs of different scales, "
                "which is not offloaded; published models route a token to one expert. Run it with transformers itself."
            )
        gate = gated_by(block.experts.act_fn)

        def expert(rows: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
            first, second = parts
            return torch.bmm(gate(torch.bmm(rows[None], first[None])), second[None])[0]

        parameters = tuple(
            ExpertParameter(name, shape_of(block, f"experts.{name}")[1:], ((f"experts.{name}",),))
            for name in (GATE_UP, DOWN)
        )
        return HeldExperts(
            block.num_experts,
            parameters,
            FamilyForm(is_transposed=True, gates="halves"),
            ExpertMath(gate, 0, 1, is_transposed=True, computes_all_rows=True),
            expert,
        )

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `AdaptedBlock`; last the scale [tokens, 1] of each token's input."""
        block: Any = self
        scores, logits = block.router(hidden)
        ids = torch.topk(logits, 1, dim=1).indices
        # Of the router's own scores: a sigmoid of the chosen alone can round otherwise.
        scale = scores.gather(1, ids)
        return logits, torch.ones_like(scale), ids, scale

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As the family's: the block's output [tokens, hidden], and the gate logits."""
        block: Any = self
        hidden = hidden_states.reshape(-1, block.hidden_dim)
        logits, weights, ids, scale = self.routing(hidden)
        out: torch.Tensor = block.shared_expert(hidden)
        out.add_(self.experts(hidden * scale, ids, weights))
        return out, logits
