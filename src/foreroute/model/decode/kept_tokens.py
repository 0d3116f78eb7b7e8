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

    def is_of(self, layer: Any) -> bool:
        """Whether these are the layer's tensors now, and one more token of each row fits."""
        is_shown = layer.keys is self.keys and layer.values is self.values
        return is_shown and self._layer() is layer and self._end < self._keys.shape[-2]

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
        """Add a token [rows, heads, 1, size]; return all that it sees, itself included."""
        start, end = self._start, self._end
        with torch.no_grad():
            for states, added in ((self._keys, keys), (self._values, values)):
                states[:, :, end : end + 1] = added
        self.written(layer)
        return self._keys[:, :, start : end + 1], self._values[:, :, start : end + 1]

    def written(self, layer: Any) -> None:
        """Note that a token has been written behind the last."""
        self._end += 1
        if self._window:
            layer.cumulative_length += 1
            self._start = max(self._start, self._end - self._window + 1)
        self._show(layer)

    def _show(self, layer: Any) -> None:
        start, count = self._start, self._end - self._start
        self.keys, self.values = layer.keys, layer.values = (
            self._keys.narrow(2, start, count), self._values.narrow(2, start, count)
        )  # fmt: skip


def room_of(cache: Any, index: int, num_rows: int) -> tuple[Any, Room] | None:
    """A cache's layer and its tensors with room for a token of `num_rows` rows; None where transformers has to add it.

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
    if room is not None and room.is_of(layer):
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
