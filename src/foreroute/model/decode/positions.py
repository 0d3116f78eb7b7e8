"""Attention of several new tokens of one row, token by token: the bits of each are those that it has as the only one.

Over the keys of all of them, with a mask, they are not: sums are split by columns, and a later token's are columns too.
A call per token and layer takes some 20 us; there is no mask to make.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from foreroute.model.decode.attention import attends_by_interface, function_of

NAME = "foreroute_positions"
_KNOWN_KINDS = frozenset({"full_attention", "sliding_attention"})
# Per thread the name of the model's own attention: transformers' interface has one function of a name for all models.
_running = threading.local()


class PositionAttention:
    """Replaces a model's own attention while several tokens of one row are computed.

    Args:
        model: one that `can_attend_by_position`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._config = model.config.get_text_config(decoder=True)
        AttentionInterface.register(NAME, attend)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model's attention is computed token by token; no mask may be given. The caller has its lock."""
        own = _running.own = self._config._attn_implementation
        self._config._attn_implementation = NAME
        try:
            yield
        finally:
            self._config._attn_implementation = own


def can_attend_by_position(model: PreTrainedModel) -> bool:
    """Whether every attention of `model` asks transformers' interface, and sees all before it or a window of them."""
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    return not kinds - _KNOWN_KINDS and attends_by_interface(model)


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """As transformers' attention functions: query [1, heads, positions, size]; keys, values [1, heads, tokens, size].

    The names of arguments are theirs: some families give the mask by name.
    """
    assert attention_mask is None, "attention token by token has no mask"
    own, count, window = function_of(module, _running.own), query.shape[2], kwargs.get("sliding_window")
    outs = []
    for at in range(count):
        end = key.shape[2] - count + at + 1
        start = max(0, end - window) if window else 0
        seen = slice(start, end)
        out, _ = own(module, query[:, :, at : at + 1], key[:, :, seen], value[:, :, seen], None, **kwargs)
        outs.append(out)
    return torch.cat(outs, 1), None
