"""Attention of one new token per row, row by row over its own keys: its bits are those that it has alone.

Over the padded keys of all rows they are not: sums are split by columns, and padding moves a row's. A call per row and
layer costs some 20 us.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

from foreroute.batching.row_layers import RowLayer

_NAME = "foreroute_rows"
_KNOWN = ("eager", "sdpa")


class RowAttention:
    """Stands in for a model's own attention while several rows get one token each.

    Args:
        model: `can_attend_by_row` of it is true.
    """

    def __init__(self, model: Any) -> None:
        self._config = model.config.get_text_config(decoder=True)
        self._own = self._config._attn_implementation

    @contextmanager
    def over(self, layers: Sequence[RowLayer]) -> Iterator[None]:
        """Inside, the model's attention is computed by row, over what `layers` hold; no mask may be given."""
        calls = 0

        def attend(
            module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, None]:
            nonlocal calls
            calls += 1
            assert mask is None, "all that a row holds is seen"
            assert query.shape[2] == 1, "one token per row"
            own = self._function(module)
            outputs = []
            for at in range(len(query)):
                seen = slice(key.shape[2] - layers[module.layer_idx].num_seen(at), None)
                one = slice(at, at + 1)
                outputs.append(own(module, query[one], key[one, :, seen], value[one, :, seen], None, **kwargs)[0])
            return torch.cat(outputs), None

        AttentionInterface.register(_NAME, attend)
        self._config._attn_implementation = _NAME
        try:
            yield
        finally:
            self._config._attn_implementation = self._own
        assert calls == len(layers), "a layer's attention was not computed by row: it saw padding"

    def _function(self, module: Any) -> Callable[..., Any]:
        if self._own == "eager":
            eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
            return eager
        own: Callable[..., Any] = AttentionInterface()[self._own]
        return own


def can_attend_by_row(model: Any) -> bool:
    """Whether every attention of `model` asks transformers' interface for its function, by one config."""
    config = model.config.get_text_config(decoder=True)
    attentions = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "o_proj")]
    is_one = len(attentions) == config.num_hidden_layers and all(one.config is config for one in attentions)
    is_known = config._attn_implementation in _KNOWN
    return is_one and is_known and all(_has_function(one) for one in attentions)


def _has_function(module: Any) -> bool:
    home = sys.modules[type(module).__module__]
    return hasattr(home, "eager_attention_forward") and hasattr(home, "ALL_ATTENTION_FUNCTIONS")
