"""Attention of each row's new tokens, one by one over its own keys: their bits are those that they have alone.

Over the padded keys of all rows they are not: sums are split by columns, and padding moves a row's. A call per row and
layer costs some 20 us.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

from foreroute.batching.row_layers import RowLayer
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.decode.attention import function_of

_NAME = "foreroute_rows"
# Per thread the step that runs in it: transformers' interface has one function of a name for all models.
_running = threading.local()


class RowAttention:
    """Replaces a model's own attention while several rows get one token each, or some that are verified.

    Args:
        model: `attends_by_interface` of it is true.
    """

    def __init__(self, model: OffloadedModel) -> None:
        self._model = model
        self._config = model.config.get_text_config(decoder=True)
        self._own = self._config._attn_implementation
        AttentionInterface.register(_NAME, _attend)

    @contextmanager
    def over(self, layers: Sequence[RowLayer]) -> Iterator[None]:
        """Inside, the model's attention is computed by row, over what `layers` hold; no mask may be given.

        Other threads wait for the model meanwhile, as its config names this attention.
        """
        with self._model.foreroute.lock:
            step = _running.step = _Step(self._own, layers)
            self._config._attn_implementation = _NAME
            try:
                yield
            finally:
                self._config._attn_implementation = self._own
                _running.step = None
        assert step.calls == len(layers), "a layer's attention was not computed by row: it saw padding"


class _Step:
    """The model's own attention by name, its layers, and how many of them were computed."""

    def __init__(self, own: str, layers: Sequence[RowLayer]) -> None:
        self.own, self.layers, self.calls = own, layers, 0


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """As transformers' attention functions: query [rows, heads, positions, size]; keys, values [rows, heads, columns,
    size]. Rows' positions and columns end together.

    The names of arguments are theirs: some families give the mask by name.
    """
    step: _Step = _running.step
    step.calls += 1
    assert attention_mask is None, "all that a row holds is seen"
    own, layer, outputs = function_of(module, step.own), step.layers[module.layer_idx], []
    num_rows, heads, positions, _ = query.shape
    for at in range(num_rows):
        row, of_row = slice(at, at + 1), []
        for behind in reversed(range(positions)):
            num_seen, end = layer.num_seen(at, behind), key.shape[2] - behind
            if not num_seen:
                of_row.append(query.new_zeros(1, 1, heads, value.shape[-1]))
                continue
            one, seen = slice(positions - 1 - behind, positions - behind), slice(end - num_seen, end)
            one_query = query[row, :, one]
            of_row.append(own(module, one_query, key[row, :, seen], value[row, :, seen], None, **kwargs)[0])
        outputs.append(of_row[0] if positions == 1 else torch.cat(of_row, 1))
    return torch.cat(outputs), None
