"""The protocol of adapters: a family's MoE block with its experts taken out.

An adapter is a subclass of `AdaptedBlock`. While a model is built, the family's block class is replaced by a subclass
of both: it runs the family's constructor, asks the adapter which tensors make an expert (`held`), drops them, and puts
`AdaptedExperts` in their place, as the child `experts`. The adapter's `forward` is the family's, but that it calls
`self.experts(hidden, ids, weights)`, through which the engine computes the weighted sum of the routed experts.
"""

import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from foreroute.checkpoint.assembly import FamilyForm
from foreroute.errors import UnsupportedModelError
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.model.experts import ExpertParameter, OffloadedExperts

# (rows [n, hidden], an expert's tensors in the order of its parameters) -> outputs [n, hidden] before gate weights.
OneExpert = Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]
# The child of an adapted block that stands for its experts.
EXPERTS = "experts"


@dataclass(frozen=True)
class HeldExperts:
    """The experts of one MoE block.

    num_experts: those that have weights.
    parameters: the tensors of every expert, in the order in which a slot holds them.
    form: how matrices are kept; of gate and up.
    math: one expert, by our kernels; positions are those of `parameters`.
    expert: the same by the family's own operations, against which `math` is proven at load, and which computes where
        it is not equal.
    """

    num_experts: int
    parameters: tuple[ExpertParameter, ...]
    form: FamilyForm
    math: ExpertMath
    expert: OneExpert


class AdaptedExperts(OffloadedExperts):
    """The experts of an adapted block, without weights: the engine computes them."""

    def __init__(self, held: HeldExperts) -> None:
        nn.Module.__init__(self)
        self.held = held
        self.num_offloaded, self.expert_parameters = held.num_experts, held.parameters
        self._call_names = ("hidden_states", "top_k_index", "top_k_weights")
        self.engine_forward = None

    def eager_sum(
        self,
        parts_of: Callable[[int], Sequence[torch.Tensor]],
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Compute as transformers' eager experts do: one after the other in ascending order, each for all its rows.

        Args:
            parts_of: expert -> its tensors. hidden: [tokens, hidden]. ids, weights: [tokens, k].
        Returns:
            The weighted sum [tokens, hidden].
        """
        total, rows_of_all, tokens_of_all = torch.zeros_like(hidden), list[torch.Tensor](), list[torch.Tensor]()
        for expert in sorted(set(ids.flatten().tolist())):
            if not 0 <= expert < self.num_offloaded:
                continue
            positions, tokens = torch.where((ids == expert).t())
            if self.held.math.computes_all_rows:
                outputs = self.held.expert(self.held.math.all_rows(hidden, tokens), parts_of(expert))[tokens]
            else:
                outputs = self.held.expert(hidden[tokens], parts_of(expert))
            weighted = self.held.math.weigh(outputs, weights[tokens, positions, None])
            rows_of_all.append(weighted.to(total.dtype))
            tokens_of_all.append(tokens)
        if self.held.math.sums_at_once and rows_of_all:
            return total.index_add_(0, torch.cat(tokens_of_all), torch.cat(rows_of_all))
        for tokens, rows in zip(tokens_of_all, rows_of_all, strict=True):
            total.index_add_(0, tokens, rows)
        return total


class Routing(nn.Module):
    """The choice of a block that routes in its own forward, as a module: the probe finds it, and it is run ahead."""

    def __init__(self, block: "AdaptedBlock") -> None:
        super().__init__()
        self._block = weakref.ref(block)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `AdaptedBlock.route`."""
        block = self._block()
        assert block is not None, "a block outlives its parts"
        return block.route(hidden)


class AdaptedBlock(nn.Module):
    """Base of adapters, and mixin in front of a family's MoE block.

    A subclass sets the class attributes, defines `held`, and overrides `forward` where the family's does not call
    `self.experts` with hidden states [tokens, hidden], expert ids and gate weights [tokens, k] each (ids that no expert
    has count for nothing). It defines `route` where the family's router is no module that returns ids and weights.

    Attributes:
        MODULE: the family's folder in transformers.models. BLOCK: the name of its block class.
        UNREAD: patterns of stored tensors that the family's class for text has no place for, which are left unread.
        NOTE: a line for users on what differs from transformers' own model; "" for nothing.
        HELD_IN: the block's children that hold the weights of its experts, and nothing else: they are dropped.
        experts: stands for them. routing: `route` as a module, for `forward` to call.
    """

    MODULE: ClassVar[str]
    BLOCK: ClassVar[str]
    HELD_IN: ClassVar[tuple[str, ...]] = (EXPERTS,)
    UNREAD: ClassVar[tuple[str, ...]] = ()
    NOTE: ClassVar[str] = ""

    experts: AdaptedExperts
    routing: Routing

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            super().__init__(*args, **kwargs)
        held = self.held(self)
        for name in self.HELD_IN:
            delattr(self, name)
        # Else the family's initialiser looks for the experts' weights; what is missing is an error in any case.
        self._is_hf_initialized = True
        self.experts = AdaptedExperts(held)
        self.routing = Routing(self)

    @staticmethod
    @abstractmethod
    def held(block: Any) -> HeldExperts:
        """Describe the experts of the family's `block`, which is whole, but on the meta device.

        Raises:
            UnsupportedModelError: a setting of the config makes another form than the adapter knows.
        """

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Choose experts for `hidden` [tokens, hidden].

        Returns:
            Gate logits [tokens, experts or more], gate weights [tokens, k] and expert ids [tokens, k] int64, in any
            order, and anything else that `forward` wants. Weights and ids are those that `experts` is called with.
        """
        raise UnsupportedModelError(f"{type(self).__name__} has a router of its own")
