"""Step 3.7: experts of the shared interface's form that are not declared to it."""

from typing import Any

from foreroute.checkpoint.assembly import FamilyForm
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.model.adapters.block import AdaptedBlock, HeldExperts
from foreroute.model.adapters.matrices import DOWN, GATE_UP, linear_expert, shape_of
from foreroute.model.experts import ExpertParameter


class Step3p7Block(AdaptedBlock):
    """Step 3.7's block, whose own forward is right as it is: it calls its router, and `experts` by the choice."""

    MODULE, BLOCK = "step3p7", "Step3p7SparseMoeBlock"

    @staticmethod
    def held(block: Any) -> HeldExperts:
        """See `AdaptedBlock`."""
        gate = block.experts._apply_gate  # clamps gate and up, in some layers
        parameters = tuple(
            ExpertParameter(name, shape_of(block, f"experts.{name}")[1:], ((f"experts.{name}",),))
            for name in (GATE_UP, DOWN)
        )
        return HeldExperts(
            block.experts.num_experts,
            parameters,
            FamilyForm(gates="halves"),
            ExpertMath(gate, 0, 1),
            linear_expert(gate),
        )
