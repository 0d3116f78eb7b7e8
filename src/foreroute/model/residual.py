"""Capture the residual stream after a layer's attention, at the norm in front of the MoE block."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from foreroute.model.blocks import MoeLayer


class ResidualTap:
    """Keeps the latest layer's residual; `remove` removes the hooks.

    Cost: one Python call per layer; memory for one residual.
    """

    def __init__(self, layers: Sequence[MoeLayer]) -> None:
        self._latest: tuple[int, torch.Tensor] | None = None
        self._handles = [
            layer.norm.register_forward_pre_hook(ResidualHook(self, layer.index)) for layer in layers if layer.norm
        ]

    def __call__(self, layer: int) -> torch.Tensor | None:
        """The residual [tokens, hidden] of MoE layer `layer`, if that is the latest one and has one; else None."""
        if self._latest is None or self._latest[0] != layer:
            return None
        return self._latest[1].flatten(0, -2)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def keep(self, layer: int, residual: torch.Tensor) -> None:
        """Keep the residual [..., hidden] of MoE layer `layer`."""
        self._latest = (layer, residual)


class ResidualHook:
    """Hears what the norm of one layer is given; model/decode/layers.py calls it where a graph computes that norm."""

    def __init__(self, tap: ResidualTap, layer: int) -> None:
        self._tap, self._layer = tap, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """As torch calls a forward pre-hook."""
        self._tap.keep(self._layer, args[0])
