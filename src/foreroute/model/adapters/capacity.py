"""Blocks whose router marks its choice in a mask, and passes over tokens beyond an expert's capacity."""

from abc import abstractmethod

import torch

from foreroute.model.adapters.block import AdaptedBlock


class CapacityBlock(AdaptedBlock):
    """An adapted block that asks the family's router itself, and shows its choice as `routing`'s.

    Run ahead, `routing` has no capacity: which of the tokens will be beyond it is not known before they are computed.
    """

    _chosen: tuple[torch.Tensor, ...] | None = None

    def show(self, hidden: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        """Let `routing` return what the family's router has chosen for `hidden` [..., hidden].

        logits: [tokens, experts]. weights, ids: [tokens, k]; the id of no expert is their number.
        """
        self._chosen = (logits, weights, ids)
        self.routing(hidden)

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `AdaptedBlock`."""
        chosen, self._chosen = self._chosen, None
        return self.ahead(hidden) if chosen is None else chosen

    @abstractmethod
    def ahead(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Choose experts for `hidden` [tokens, hidden] without capacity: logits, weights and ids as for `show`."""
