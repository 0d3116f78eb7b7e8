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
            layer.norm.register_forward_pre_hook(self._catching(layer.index)) for layer in layers if layer.norm
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

    def _catching(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._latest = (layer, args[0])

        # model/decode/layers.py calls it where the norm is part of a graph.
        hook.takes_residual = True  # type: ignore[attr-defined]
        return hook
