"""Measure how much memory the KV cache takes by running the model, as families store it in many ways.

Latent attention keeps one narrow vector per token, some layers have their own head width, linear attention keeps a
state that does not grow: no formula over a config was right for all families.
"""

from collections.abc import Sequence
from typing import Any

import torch

from foreroute.model.blocks import MoeLayer
from foreroute.model.caches import CACHE_NAME

_TOKEN = 1


def kv_bytes_per_token(model: Any) -> int:
    """Bytes by which `model`'s cache grows per token and row, while no sliding window is full; 0 without growth.

    Two tokens' less one's: constant state does not count. Experts must be computable. Cost: two forward passes.
    """
    sizes = []
    with torch.no_grad():
        for num_tokens in (1, 2):
            output = model(input_ids=torch.full((1, num_tokens), _TOKEN, device=model.device), use_cache=True)
            layers = getattr(getattr(output, CACHE_NAME, None), "layers", [])
            held = [value for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
            sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in held))
    return sizes[1] - sizes[0]


def kv_bytes_without_experts(model: Any, layers: Sequence[MoeLayer]) -> int:
    """The same while `layers` of `model` return zeros in place of their experts, which changes no cache size."""

    def nothing(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden)

    forwards = [layer.experts.engine_forward for layer in layers]
    for layer in layers:
        layer.experts.engine_forward = nothing
    try:
        return kv_bytes_per_token(model)
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.experts.engine_forward = forward


def planned_kv_bytes_per_token(model: Any) -> int:
    """The value measured when `model` was loaded with kv_tokens, else measured now."""
    known = model.foreroute.plan.kv_bytes_per_token
    return kv_bytes_without_experts(model, model.foreroute.layers) if known is None else int(known)
