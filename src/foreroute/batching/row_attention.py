"""Attention of each row's new tokens over its own keys, without padding and without a mask.

In decoding one by one: their bits are those that they have alone. Over the padded keys of all rows they are not: sums
are split by columns, and padding moves a row's. A call per row and layer costs some 20 us. Of prompts by chunks
(kernels/torch/chunk_attention.py): a mask of chunk x context takes memory and time in every layer.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

from foreroute.batching.row_layers import RowLayer
from foreroute.kernels.torch.chunk_attention import attend_chunk, takes
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.decode.attention import PRODUCTS, attends_in_chunks, function_of, tokens_of_block

_NAME = "foreroute_rows"
# Per thread the step that runs in it: transformers' interface has one function of a name for all models.
_running = threading.local()


class RowAttention:
    """Replaces a model's own attention while several rows get one token each, or some that are verified.

    Args:
        model: `attends_by_interface` of it is true. of_chunks: of prompts' tokens, in place of those.
    """

    def __init__(self, model: OffloadedModel, *, of_chunks: bool = False) -> None:
        self._model, self._of_chunks = model, of_chunks
        self._config = model.config.get_text_config(decoder=True)
        self._own = self._config._attn_implementation
        AttentionInterface.register(_NAME, _attend)

    @contextmanager
    def over(self, layers: Sequence[Any]) -> Iterator[None]:
        """Inside, the model's attention is computed by row, over what `layers` hold; no mask may be given.

        layers: of the cache; those that hold keys are attended to.

        Other threads wait for the model meanwhile, as its config names this attention.
        """
        with self._model.foreroute.lock:
            step = _running.step = _Step(self._own, layers, of_chunks=self._of_chunks)
            self._config._attn_implementation = _NAME
            try:
                yield
            finally:
                self._config._attn_implementation = self._own
                _running.step = None
        num_attentions = sum(isinstance(layer, RowLayer) for layer in layers)
        assert step.calls == num_attentions, "a layer's attention was not computed by row: it saw what it may not"


def chunk_attention(model: OffloadedModel) -> RowAttention | None:
    """What computes the attention of prompts' chunks to `model`; None: its own function does, with masks."""
    return RowAttention(model, of_chunks=True) if attends_in_chunks(model) else None


class _Step:
    """The model's own attention by name, its layers, and how many of them were computed."""

    def __init__(self, own: str, layers: Sequence[Any], *, of_chunks: bool) -> None:
        self.own, self.layers, self.calls, self.of_chunks = own, layers, 0, of_chunks
        # Torch's scaled_dot_product_attention, where several tokens attend: masks are of booleans.
        self.is_product = own in PRODUCTS


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
        if step.of_chunks:
            outputs.append(_of_chunk(step, module, query[row], key[row], value[row], at, kwargs))
            continue
        for behind in reversed(range(positions)):
            num_seen, end = layer.num_seen(at, behind), key.shape[2] - behind
            if not num_seen:
                of_row.append(query.new_zeros(1, 1, heads, value.shape[-1]))
                continue
            one, seen = slice(positions - 1 - behind, positions - behind), slice(end - num_seen, end)
            one_query = query[row, :, one]
            of_row.append(own(module, one_query, key[row, :, seen], value[row, :, seen], None, **kwargs)[0])
        outputs.append(of_row[0] if positions == 1 else torch.cat(of_row, 1))
    return outputs[0] if num_rows == 1 else torch.cat(outputs), None


def _of_chunk(
    step: _Step, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, at: int, kwargs: Any
) -> torch.Tensor:
    """The same of the row at `at` alone, of whose positions and columns the last are its own."""
    layer: RowLayer = step.layers[module.layer_idx]
    (num_new, held), (_, heads, positions, _) = layer.num_new(at), query.shape
    query, key, value = query[:, :, positions - num_new :], key[:, :, -held:], value[:, :, -held:]
    is_plain = kwargs.get("position_bias") is None and kwargs.get("softcap") is None
    if step.is_product and is_plain and not layer.is_sliding and takes(query, key, value):
        output = attend_chunk(query, key, value, kwargs.get("scaling"))
    else:
        output = _in_blocks(step, module, query, key, value, layer.window, kwargs)
    padding = query.new_zeros(1, positions - num_new, heads, value.shape[-1])
    return torch.cat([padding, output], 1) if num_new < positions else output


def _in_blocks(
    step: _Step,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    kwargs: Any,
) -> torch.Tensor:
    """The same by the model's own function, for as many tokens at a time as keep its numbers within `BLOCK_BYTES`."""
    own, outputs = function_of(module, step.own), []
    num_new, held = query.shape[2], key.shape[2]
    for first in range(0, num_new, size := tokens_of_block(query.shape[1], held)):
        last = min(first + size, num_new)
        begin = 0 if window is None else max(0, held - num_new + first - window + 1)
        end = held - num_new + last
        columns, tokens = torch.arange(begin, end), torch.arange(end - (last - first), end)[:, None]
        is_seen = columns <= tokens if window is None else (columns <= tokens) & (columns > tokens - window)
        mask = None if is_seen.all() else is_seen[None, None].to(query.device)
        if mask is not None and not step.is_product:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
        block = query[:, :, first:last], key[:, :, begin:end], value[:, :, begin:end]
        outputs.append(own(module, *block, mask, **kwargs)[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
