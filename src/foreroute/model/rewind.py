"""Take back the last tokens of a KV cache after a step, also where others have left a sliding window for them."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from foreroute.model.decode.kept_tokens import Room, own_room


def most_rewound(cache: DynamicCache) -> int | None:
    """Positions of a step that can be taken back; None for any number, 0 where none can."""
    kinds = {type(layer) for layer in cache.layers}
    if not kinds or kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
        return 0
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return max(min(windows) - 1, 0) if windows else None


class Rewind:
    """Made before a step of `most_rewound` positions at most; `drop` takes some of its positions back.

    Tensors of a cache layer are replaced and not changed, so that those of before a step can be kept without a copy.
    """

    def __init__(self, cache: DynamicCache) -> None:
        self._cache = cache
        self._before: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        layers: list[Any] = cache.layers
        for layer in layers:
            is_window = isinstance(layer, DynamicSlidingWindowLayer) and own_room(layer) is None
            self._before.append((layer.keys, layer.values) if is_window else None)

    def drop(self, count: int, num_positions: int) -> None:
        """Take back the last `count` of the step's `num_positions`."""
        if not count:
            return
        layers: list[Any] = self._cache.layers
        for layer, before in zip(layers, self._before, strict=True):
            room: Room | None = own_room(layer)
            if room is not None:
                room.drop(layer, count)
            elif before is None:
                layer.crop(-count)
            else:
                kept = num_positions - count
                layer.keys, layer.values = (
                    torch.cat([old, new[:, :, -num_positions:][:, :, :kept]], -2)[:, :, -layer.sliding_window + 1 :]
                    for old, new in zip(before, (layer.keys, layer.values), strict=True)
                )
                layer.cumulative_length -= count
