"""Experts computed where they lie in the pool, for the device control plane: on the CPU the plain way."""

from collections.abc import Sequence

import torch

from foreroute.engine.decode import RowsStep
from foreroute.engine.memory import SlotViews
from foreroute.kernels.cpu import ExpertMath


class PlainSlotMath:
    """Expert after expert in ascending order, as transformers' eager experts: bits are the same. Reads slots back."""

    def __init__(self, views: SlotViews, math: Sequence[ExpertMath]) -> None:
        self._views = views
        self._math = list(math)

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """See `device_tier.SlotMath`."""
        slot_of: dict[int, int] = {}
        routed = []
        for experts, places in zip(ids.tolist(), slots.tolist(), strict=True):
            routed.append([expert if slot >= 0 else -1 for expert, slot in zip(experts, places, strict=True)])
            slot_of.update(zip(experts, places, strict=True))
        wanted = sorted({expert for row in routed for expert in row} - {-1})
        step = RowsStep(
            self._math[layer],
            lambda expert: self._views.operands(layer, slot_of[expert]),
            hidden,
            routed,
            weights,
        )
        step.run(wanted)
        return step.total()
