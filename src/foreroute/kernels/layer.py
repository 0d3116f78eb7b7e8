"""Protocols of a compute backend: it computes one MoE layer at a time from experts in slots.

A backend (torch in kernels/torch/layer.py) knows how to compute an expert and where a slot's bytes are; each call gives
it the experts' slots. It sums in ascending expert key, so that its bits do not depend on what was resident: "exact"
means the bits of the same backend with every expert in memory.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

# (expert key, slot): a resident expert, pinned until the sum is complete.
Placed = tuple[int, int]
# Called with (layer, expert, its outputs [rows, hidden] before gate weights), for streamed experts.
ExpertListener = Callable[[int, int, torch.Tensor], None]


class LayerSum(Protocol):
    """One MoE layer's weighted sum in one step: add experts in any order and grouping, then call `total` once."""

    def add(self, experts: Sequence[Placed]) -> None:
        """Compute these experts for the tokens routed to them."""
        ...

    def substitute(self, keys: Sequence[int], vectors: torch.Tensor) -> None:
        """Use `vectors` [keys, hidden] as the outputs of experts `keys`, for every token routed to them."""
        ...

    def total(self) -> torch.Tensor:
        """Return the weighted sum [tokens, hidden], accumulated in ascending key, as transformers' eager experts."""
        ...


class ExpertSlots(Protocol):
    """Slots of experts streamed in ascending key, each once: engine/moe_step.py.

    Attributes:
        most_held: experts whose slots are valid together: the `num_held` of the layer's kernels, or as many as fit.
    """

    @property
    def most_held(self) -> int: ...

    def slot_of(self, key: int) -> int:
        """Return the slot of this expert; blocks until it is loaded. Valid until `most_held` others are asked for."""
        ...

    def resident(self, keys: Sequence[int]) -> dict[int, int]:
        """Return those of `keys` that were resident when the layer began, and their slots: valid together until the
        first call of `slot_of`."""
        ...


class LayerKernels(Protocol):
    """Computes the experts of one MoE layer. One step at a time: `begin` may return the same object each time.

    Attributes:
        streams_only: `begin` is not supported, as the family's own forward computes this layer.
        num_held: experts whose slots `stream` holds together.
    """

    @property
    def streams_only(self) -> bool: ...

    @property
    def num_held(self) -> int: ...

    def begin(self, hidden: torch.Tensor, routed: Sequence[Sequence[int]], weights: torch.Tensor) -> LayerSum:
        """Begin the sum of a step of few tokens, whose experts are pinned together.

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
        """Compute the sum [tokens, hidden] of many tokens, one expert after the other.

        Args:
            experts: gives the slots of `keys`, all keys routed to, ascending.
            ids: [tokens, k] int64 expert ids of the layer; others are ignored. hidden, weights: as of `begin`.
            listener: called with each expert's outputs, unless the family's own forward computes them.
        """
        ...

    def close(self) -> None:
        """Drop the references to the slots' memory, so that it can be freed; nothing can be computed afterwards."""
        ...
