"""How much memory keys and values take: measured on the model itself, as families keep them in many ways.

Latent attention keeps one narrow vector per token, some layers have heads of their own width, linear attention keeps a
state that does not grow: no formula over a config was right for all families.
"""

from collections.abc import Sequence
from typing import Any

import torch

from foreroute.model.blocks import MoeLayer
from foreroute.model.caches import CACHE_NAME

_TOKEN = 1


def kv_bytes_per_token(model: Any) -> int:
    """Bytes by which the cache grows per token and row, while no sliding window is full; 0 where nothing grows.

    Two tokens' less one's: a state of constant size does not count. Experts must answer. Cost: two forward passes.
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
    """The same before the experts can answer: they say nothing, which takes no part in how large a cache is."""

    def nothing(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden)

    for layer in layers:
        layer.experts.engine_forward = nothing
    try:
        return kv_bytes_per_token(model)
    finally:
        for layer in layers:
            layer.experts.engine_forward = None


def planned_kv_bytes_per_token(model: Any) -> int:
    """What was measured when the model was loaded with kv_tokens, or is now."""
    known = model.foreroute.plan.kv_bytes_per_token
    return kv_bytes_per_token(model) if known is None else int(known)
