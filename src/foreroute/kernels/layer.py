"""What a compute backend offers to the engine: one MoE layer at a time, from experts that lie in slots.

A backend (torch in kernels/torch/layer.py) knows how an expert is computed and where a slot's bytes are; which expert
is in which slot it is told with each call. It sums in ascending expert key, so that its bits do not depend on what was
resident: "exact" means the bits of the same backend with every expert in memory.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

# (expert key, slot): an expert whose bytes are in memory, and stay there until the sum is complete.
Placed = tuple[int, int]
# Called with (layer, expert, its outputs [rows, hidden] before gate weights), for experts that are streamed.
ExpertListener = Callable[[int, int, torch.Tensor], None]


class LayerSum(Protocol):
    """One MoE layer's weighted sum for one step: experts in any order and any grouping, then `total` once."""

    def add(self, experts: Sequence[Placed]) -> None:
        """Compute these experts for the tokens routed to them."""
        ...

    def substitute(self, keys: Sequence[int], vectors: torch.Tensor) -> None:
        """Take `vectors` [keys, hidden] for the outputs of these experts, for every token routed to them."""
        ...

    def total(self) -> torch.Tensor:
        """The weighted sum [tokens, hidden], accumulated in ascending key, as transformers' eager experts do."""
        ...


class ExpertSlots(Protocol):
    """Experts that pass by in ascending key, each once: engine/expert_stream.py."""

    def slot_of(self, key: int) -> int:
        """The slot of this expert; blocks until its bytes are there. They stay until the next key is asked for."""
        ...


class LayerKernels(Protocol):
    """The experts of one MoE layer. One step at a time: what `begin` returns may be the same object each time.

    Attributes:
        streams_only: `begin` is not offered, as the family's own forward computes this layer.
    """

    @property
    def streams_only(self) -> bool: ...

    def begin(self, hidden: torch.Tensor, routed: Sequence[Sequence[int]], weights: torch.Tensor) -> LayerSum:
        """Begin the sum of a step of few tokens, whose experts are all in memory at once before it ends.

        Args:
            hidden: [tokens, hidden]. weights: [tokens, k] gate weights.
            routed: per token its k expert keys; a negative one is no expert and adds nothing.
        """
        ...

    def stream(
        self,
        experts: ExpertSlots,
        keys: Sequence[int],
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        listener: ExpertListener | None = None,
    ) -> torch.Tensor:
        """The sum [tokens, hidden] of many tokens, one expert after the other.

        Args:
            keys: all that is routed to, ascending.
            ids: [tokens, k] int64 expert indices of the layer; others are ignored. hidden, weights: as of `begin`.
            listener: is shown each expert's outputs, where this backend computes it by itself.
        """
        ...

    def close(self) -> None:
        """Forget the slots' memory, so that it can be freed; nothing can be computed afterwards."""
        ...
