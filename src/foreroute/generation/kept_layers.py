"""What of a KV cache is kept for later prompts: tensors that grow with the tokens, in parts, and states that do not.

Plain attention's keys and values can be cut and joined anywhere. A sliding window has only the latest of them, and
linear attention, convolutions and Mamba have a state: both are kept whole, as they are after some token.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from foreroute.model.caches import TOKEN_AXIS, grown_tensors, has_state, is_known

_CONTIGUOUS = torch.contiguous_format


class Segment:
    """Keys and values of consecutive tokens: per layer the tensors that grow, by name."""

    def __init__(self, layers: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self.layers = list(layers)
        self.nbytes = sum(tensor.nbytes for layer in layers for tensor in layer.values())

    @classmethod
    def of(cls, cache: DynamicCache, start: int, end: int) -> "Segment":
        """Copy the tokens [start, end) of a cache."""
        return cls([
            {name: _slice(getattr(layer, name), TOKEN_AXIS, start, end) for name in grown_tensors(layer)}
            for layer in cache.layers
        ])  # fmt: skip

    def split(self, at: int) -> tuple["Segment", "Segment"]:
        """See prefix_tree.KeptPart. This one is empty afterwards, so that only one layer is there twice."""
        first: list[dict[str, torch.Tensor]] = []
        second: list[dict[str, torch.Tensor]] = []
        while self.layers:
            layer = self.layers.pop(0)
            first.append({name: _slice(one, TOKEN_AXIS, 0, at) for name, one in layer.items()})
            second.append({name: _slice(one, TOKEN_AXIS, at, one.shape[TOKEN_AXIS]) for name, one in layer.items()})
        return Segment(first), Segment(second)


def _slice(tensor: torch.Tensor, axis: int, start: int, end: int) -> torch.Tensor:
    return tensor.narrow(axis, start, end - start).clone(memory_format=_CONTIGUOUS)


@dataclass(frozen=True)
class LayerStates:
    """States of all layers after `end` tokens, which can be cut to `least`; see prefix_tree.State."""

    end: int
    least: int
    layers: tuple[Mapping[str, Any], ...]
    nbytes: int

    @classmethod
    def of(cls, cache: DynamicCache, end: int) -> "LayerStates":
        """Copy the states of a cache that `is_whole`."""
        layers = tuple(_state_of(layer, end) if has_state(layer) else {} for layer in cache.layers)
        return cls(end, least_of(cache, end), layers, sum(map(_bytes_of, layers)))

    def packed(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors by names, and the rest as JSON has it."""
        flat = [(f"{at}.{name}", value) for at, layer in enumerate(self.layers) for name, value in layer.items()]
        by_state = [
            (f"{name}.{at}", one) for name, value in flat if isinstance(value, dict) for at, one in value.items()
        ]
        values = [(name, value) for name, value in [*flat, *by_state] if not isinstance(value, dict)]
        tensors = {name: value for name, value in values if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in values if isinstance(value, int | None)}
        return tensors, {"end": self.end, "least": self.least, "layers": len(self.layers), "others": others}

    @classmethod
    def unpacked(cls, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> "LayerStates":
        """What `packed` took apart."""
        layers: list[dict[str, Any]] = [{} for _ in range(about["layers"])]
        for path, value in (*tensors.items(), *about["others"].items()):
            at, name, *of_state = path.split(".")
            if of_state:
                layers[int(at)].setdefault(name, {})[int(of_state[0])] = value
            else:
                layers[int(at)][name] = value
        return cls(about["end"], about["least"], tuple(layers), sum(map(_bytes_of, layers)))


def state_bytes(cache: DynamicCache) -> int:
    """Most bytes that `LayerStates.of` the cache takes."""
    return sum(_bytes_of(_attributes(layer)) for layer in cache.layers if has_state(layer))


def least_of(cache: DynamicCache, end: int) -> int:
    """The fewest tokens to which states after `end` of them can be cut."""
    return max((_least(layer, end) for layer in cache.layers if has_state(layer)), default=0)


def is_whole(cache: DynamicCache, length: int) -> bool:
    """Whether every layer holds `length` tokens, and more only where they can be cut off."""
    layers = cache.layers
    if not layers or not all(is_known(layer) and _is_whole(layer, length) for layer in layers):
        return False
    # A state does not say how many tokens it has seen: the layers beside it do.
    is_exact = not any(isinstance(layer, LinearAttentionLayer) for layer in layers)
    lengths = {layer.get_seq_length() for layer in layers if isinstance(layer, DynamicLayer)}
    return is_exact or lengths == {length}


class LayerParts:
    """A layer of a kept beginning whose tokens lie in several tensors, for one who copies them to a place of its own.

    Attributes:
        layer: like that of a cache, with all that does not grow, and the tokens of the first part.
        parts: by name [1, heads, tokens, size], one after the other.
    """

    def __init__(self, layer: Any, parts: Mapping[str, Sequence[torch.Tensor]]) -> None:
        self.layer, self.parts = layer, parts


def continued_layer(empty: Any, at: int, segments: Sequence[Segment], length: int, states: LayerStates | None) -> Any:
    """A layer like `empty`, the one at `at`, with the first `length` tokens of segments, and states that serve them.

    Tensors are those of a segment itself where one is enough: layers replace such tensors and do not change them.
    """
    found = continued_parts(empty, at, segments, length, states)
    for name, parts in found.parts.items():
        setattr(found.layer, name, parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=TOKEN_AXIS))
    return found.layer


def continued_parts(
    empty: Any, at: int, segments: Sequence[Segment], length: int, states: LayerStates | None
) -> LayerParts:
    """The same, where nothing is copied that grows with the tokens."""
    layer = copy.copy(empty)
    grown = {name: _cut([one.layers[at][name] for one in segments], length) for name in grown_tensors(layer)}
    if grown:
        DynamicLayer.lazy_initialization(layer, grown["keys"][0], grown["values"][0])
        layer.keys, layer.values = grown["keys"][0], grown["values"][0]
    if states is not None and states.layers[at]:
        _restore(layer, states.layers[at], states.end - length, length)
    return LayerParts(layer, grown)


def token_bytes(cache: DynamicCache) -> int:
    """Bytes of the tensors that grow, for each token."""
    grown = [getattr(layer, name) for layer in cache.layers for name in grown_tensors(layer)]
    return sum(tensor.nbytes // tensor.shape[TOKEN_AXIS] for tensor in grown)


def _cut(parts: Sequence[torch.Tensor], length: int) -> list[torch.Tensor]:
    """The first `length` tokens of all."""
    cut, left = [], length
    for part in parts:
        cut.append(part.narrow(TOKEN_AXIS, 0, min(left, part.shape[TOKEN_AXIS])))
        left -= cut[-1].shape[TOKEN_AXIS]
    return cut


def _is_whole(layer: Any, length: int) -> bool:
    if isinstance(layer, LinearAttentionLayer) and not all(layer.has_previous_state.values()):
        return False
    if not isinstance(layer, DynamicLayer):
        return True
    if not layer.is_initialized:
        return False
    if isinstance(layer, DynamicSlidingWindowLayer):
        return _is_whole_window(layer, length)
    # Ctrl-C may fall between the line that adds keys and the one that adds values.
    held = {getattr(layer, name).shape[TOKEN_AXIS] for name in grown_tensors(layer)}
    return len(held) == 1 and min(held) >= length


def _is_whole_window(layer: Any, length: int) -> bool:
    added, columns = layer.cumulative_length, layer.keys.shape[-2]
    if added < length or layer.values.shape[-2] != columns:
        return False
    # All that it should hold, and after a cut still all that a window sees.
    is_consistent = min(added, layer.sliding_window - 1) <= columns <= added
    return is_consistent and _least(layer, added) <= length


def _least(layer: Any, end: int) -> int:
    if not isinstance(layer, DynamicSlidingWindowLayer) or isinstance(layer, LinearAttentionLayer):
        return end
    added, columns = layer.cumulative_length, layer.keys.shape[-2]
    return 0 if columns == added else added - columns + layer.sliding_window - 1


def _attributes(layer: Any) -> dict[str, Any]:
    """What the layer holds beside the tensors that grow, and room for tokens to come."""
    grown = grown_tensors(layer)
    return {name: value for name, value in vars(layer).items() if name not in grown and not name.startswith("_")}


def _state_of(layer: Any, end: int) -> dict[str, Any]:
    state = {name: _clone(value) for name, value in _attributes(layer).items() if name not in ("keys", "values")}
    if isinstance(layer, DynamicSlidingWindowLayer):
        kept = layer.keys.shape[-2] - (layer.cumulative_length - end)
        state |= {name: _slice(getattr(layer, name), -2, 0, kept) for name in ("keys", "values")}
        state["cumulative_length"] = end
    return state


def _restore(layer: Any, state: Mapping[str, Any], too_many: int, length: int) -> None:
    """Give a layer a copy of a state, without its last tokens."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        DynamicSlidingWindowLayer.lazy_initialization(layer, state["keys"], state["values"])
        last = state["keys"].shape[-2] - too_many
        first = max(0, last - layer.sliding_window + 1)
        layer.keys, layer.values = (state[name].narrow(-2, first, last - first) for name in ("keys", "values"))
        layer.cumulative_length = length
        state = {name: value for name, value in state.items() if name not in ("keys", "values", "cumulative_length")}
    vars(layer).update({name: _clone(value) for name, value in state.items()})
    for states in state.get("conv_states", {}).values():
        if states is not None:
            layer.device, layer.dtype = states.device, states.dtype


def _clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone(memory_format=_CONTIGUOUS)
    return {name: _clone(one) for name, one in value.items()} if isinstance(value, dict) else value


def _bytes_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes_of, value.values())) if isinstance(value, Mapping) else 0
