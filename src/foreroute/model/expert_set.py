"""The experts of one loaded model: where each lies, how it is computed, and the layers that call them."""

from dataclasses import dataclass, replace

import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.records import PackedStore
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.model.blocks import MoeLayer, on_device


@dataclass(frozen=True)
class ExpertSet:
    """What every part of the engine asks about the experts; layers and table are in the order the model calls them.

    layers: the MoE layers as the probe saw them.
    table: the experts as they are read: from the packed store where there is one, else from the checkpoint.
    source: the experts as the checkpoint stores them. store: the packed store, or None.
    math: per layer our kernels; None where they could not be proven equal to the family's.
    dtype: the compute dtype. device: where the dense part is, and the slots.
    """

    layers: tuple[MoeLayer, ...]
    table: ExpertTable
    source: ExpertTable
    store: PackedStore | None
    math: tuple[ExpertMath | None, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def top_k(self) -> tuple[int, ...]:
        """Experts per token, by layer."""
        return tuple(layer.top_k for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Slots for all experts, in bytes."""
        return self.table.total_slots * self.table.slot_bytes

    @property
    def token_demand_bytes(self) -> int:
        """Slots for the experts that one token uses, in bytes."""
        return sum(self.top_k) * self.table.slot_bytes

    @property
    def has_own_math(self) -> bool:
        """Whether our kernels compute every layer, so that single experts can be left out or computed apart."""
        return all(entry is not None for entry in self.math)

    def on(self, device: torch.device) -> "ExpertSet":
        """The same once the dense part has been moved to `device`."""
        return replace(self, layers=tuple(on_device(list(self.layers), device)), device=device)
