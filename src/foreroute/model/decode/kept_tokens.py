"""Keys and values of a cache layer with room for tokens to come: transformers copies all of them for each new token.

The cache layer keeps its own class, and its `keys` and `values` are views of larger tensors. What these views show is
never written again, so that whoever shares them (a kept prompt, a branch, a copy) is not disturbed: only the layer that
made the larger tensors writes behind its last token; any other, and one that was cut, takes new ones first.
"""

import weakref
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from foreroute.kernels.ggml.decoder.layer import KeptTokens

_ATTRIBUTE = "_foreroute_room"
# Tokens that there is room for behind those that are held.
_ROOM = 64


class Room:
    """The larger tensors [rows, heads, tokens, size] of one cache layer; see `room_of`."""

    def __init__(self, layer: Any) -> None:
        self._layer = weakref.ref(layer)
        held = layer.keys.shape[-2]
        self._keys, self._values = (_longer(one, held + _ROOM) for one in (layer.keys, layer.values))
        self._start, self._end = 0, held
        self._window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else 0
        self._show(layer)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or saved cache takes new tensors when it is continued.
        return (type(None), ())

    def is_shown(self, layer: Any) -> bool:
        """Whether these are the layer's tensors now."""
        return layer.keys is self.keys and layer.values is self.values and self._layer() is layer

    def is_of(self, layer: Any, count: int = 1) -> bool:
        """Whether these are the layer's tensors now, and `count` more tokens of each row fit."""
        return self.is_shown(layer) and self._end + count <= self._keys.shape[-2]

    @property
    def count(self) -> int:
        """Tokens that the next one sees before it."""
        return self._end - self._start

    def tokens(self) -> KeptTokens:
        """Where the held tokens of the first row lie; the next one's place is behind them."""
        _, per_head, per_token, _ = self._keys.stride()
        behind = 4 * per_token * self._start
        return KeptTokens(
            self._keys.data_ptr() + behind, self._values.data_ptr() + behind, 4 * per_head, self._end - self._start
        )

    def append(self, layer: Any, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens [rows, heads, tokens, size]; return all that the first sees, and these."""
        start, end, count = self._start, self._end, keys.shape[-2]
        with torch.no_grad():
            for states, added in ((self._keys, keys), (self._values, values)):
                states[:, :, end : end + count] = added
        self.written(layer, count)
        return self._keys[:, :, start : end + count], self._values[:, :, start : end + count]

    def written(self, layer: Any, count: int = 1) -> None:
        """Note that `count` tokens have been written behind the last."""
        self._end += count
        if self._window:
            layer.cumulative_length += count
            self._start = max(self._start, self._end - self._window + 1)
        self._show(layer)

    def drop(self, layer: Any, count: int) -> None:
        """Take back the last `count` tokens, which no caller has seen; those before them are in the window again."""
        self._end -= count
        if self._window:
            layer.cumulative_length -= count
            self._start = max(0, self._end - self._window + 1)
        self._show(layer)

    def _show(self, layer: Any) -> None:
        start, count = self._start, self._end - self._start
        self.keys, self.values = layer.keys, layer.values = (
            self._keys.narrow(2, start, count), self._values.narrow(2, start, count)
        )  # fmt: skip


def own_room(layer: Any) -> Room | None:
    """The larger tensors whose parts the layer's keys and values are now; None where they are not."""
    room: Room | None = layer.__dict__.get(_ATTRIBUTE)
    return room if room is not None and room.is_shown(layer) else None


def room_of(cache: Any, index: int, num_rows: int, count: int = 1) -> tuple[Any, Room] | None:
    """A cache's layer and its tensors with room for `count` tokens of `num_rows` rows; None where transformers has to
    add them.

    That is so for other classes of caches and tensors, and where it would refuse: other rows, values of other tokens.
    """
    if type(cache) is not DynamicCache or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    is_sliding = type(layer) is DynamicSlidingWindowLayer
    if not is_sliding and type(layer) is not DynamicLayer:
        return None
    if not layer.is_initialized or (is_sliding and getattr(layer, "record_past", False)):
        return None
    keys, values = layer.keys, layer.values
    if len(keys) != num_rows:
        return None
    room = layer.__dict__.get(_ATTRIBUTE)
    if room is not None and room.is_of(layer, count):
        return layer, room
    if not all(one.device.type == "cpu" and one.dtype == torch.float32 for one in (keys, values)):
        return None
    if keys.shape[:3] != values.shape[:3]:
        return None
    room = layer.__dict__[_ATTRIBUTE] = Room(layer)
    return layer, room


def _longer(states: torch.Tensor, tokens: int) -> torch.Tensor:
    rows, heads, held, size = states.shape
    # A normal tensor even if this caller's inference mode is on: the next token may come outside of it.
    with torch.inference_mode(False), torch.no_grad():
        longer = torch.empty((rows, heads, tokens, size), dtype=states.dtype, device="cpu")
        longer[:, :, :held] = states
        longer[:, :, held:] = 0  # saved caches contain it
    return longer
