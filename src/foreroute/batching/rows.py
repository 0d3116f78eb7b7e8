"""Keys and values of several requests in one cache: rows of different lengths, aligned at their ends."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from foreroute.engine.lean_loop import is_ordinary
from foreroute.engine.prompt_cache import can_be_continued, new_cache

# A row of a cache, and how many tokens it holds.
Row = tuple[DynamicCache, int, int]


def why_not_batched(model: Any) -> str:
    """Why requests cannot share steps of this model; "" where they can."""
    cache = new_cache(model)
    if cache is None or not is_ordinary(model):
        return "the family keeps its state in a way of its own"
    if not can_be_continued(model, cache):
        return "not all its layers are plain or sliding-window attention with fixed positions"
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        return f"its attention is of a kind not known here ({', '.join(sorted(kinds))})"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no positions"
    return ""


class RowsCache:
    """The rows that decode together; shorter ones have padding on their left, which is masked.

    Between changes of who is there, a step appends to all rows as transformers' own cache does.

    Attributes:
        lengths: tokens of each row.
    """

    def __init__(self) -> None:
        self.cache: DynamicCache | None = None
        self.lengths: list[int] = []

    def arrange(self, kept: Sequence[int], new: Sequence[tuple[DynamicCache, int]]) -> None:
        """From now on, the rows `kept` (their places so far), and behind them new ones: cache of one row, length."""
        if list(kept) == list(range(len(self.lengths))) and not new:
            return
        rows: list[Row] = [(self.cache, at, self.lengths[at]) for at in kept if self.cache is not None]
        rows += [(cache, 0, length) for cache, length in new]
        # Both or neither: where memory runs out, the rows that were there go on.
        cache = _joined(rows) if rows else None
        self.cache, self.lengths = cache, [length for _, _, length in rows]

    def row(self, at: int) -> DynamicCache:
        """A cache of one row alone, in memory of its own."""
        assert self.cache is not None, "there is such a row"
        return _joined([(self.cache, at, self.lengths[at])])

    def step(self, model: Any, tokens: Sequence[int]) -> torch.Tensor:
        """One token more for every row; returns logits [rows, vocabulary], fp32."""
        width = max(self.lengths) + 1
        kwargs: dict[str, Any] = {"position_ids": torch.tensor([[length] for length in self.lengths])}
        if min(self.lengths) + 1 < width:
            real = torch.tensor([[length + 1] for length in self.lengths])
            kwargs["attention_mask"] = (torch.arange(width)[None] >= width - real).long()
        ids = torch.tensor([[token] for token in tokens])
        out = model(input_ids=ids, past_key_values=self.cache, use_cache=True, return_dict=True, **kwargs)
        self.lengths = [length + 1 for length in self.lengths]
        return out.logits[:, -1].float()


def _joined(rows: Sequence[Row]) -> DynamicCache:
    """One cache of all `rows`, aligned at their ends."""
    longest = max(length for _, _, length in rows)
    whole = copy.copy(rows[0][0])
    whole.layers = [
        _joined_layer([(cache.layers[at], row, length) for cache, row, length in rows], longest)
        for at in range(len(whole.layers))
    ]
    return whole


def _joined_layer(rows: Sequence[tuple[Any, int, int]], longest: int) -> DynamicLayer:
    layer: Any = copy.copy(rows[0][0])
    if not layer.is_initialized:
        return layer
    most = longest
    if isinstance(layer, DynamicSlidingWindowLayer):
        most = min(longest, layer.sliding_window - 1)
        layer.cumulative_length = longest
    layer.keys = torch.cat([_aligned(one.keys[row : row + 1], min(length, most), most) for one, row, length in rows])
    layer.values = torch.cat(
        [_aligned(one.values[row : row + 1], min(length, most), most) for one, row, length in rows]
    )
    return layer


def _aligned(states: torch.Tensor, held: int, width: int) -> torch.Tensor:
    """The last `held` positions of [1, heads, positions, size], with zeros before them up to `width`."""
    return pad(states[:, :, states.shape[-2] - held :], (0, 0, width - held, 0))


class OneRow:
    """In the place of `RowsCache` for a model that cannot be batched: one row, its state as the family keeps it."""

    def __init__(self) -> None:
        self._cache: Any = None
        self.lengths: list[int] = []

    def arrange(self, kept: Sequence[int], new: Sequence[tuple[Any, int]]) -> None:
        """From now on, the row that was there, or the new one."""
        if not kept:
            self._cache, self.lengths = None, []
        for cache, length in new:
            assert not self.lengths, "there is one row"
            self._cache, self.lengths = cache, [length]

    def row(self, at: int) -> Any:
        """Its cache."""
        return self._cache

    def step(self, model: Any, tokens: Sequence[int]) -> torch.Tensor:
        """One token more; returns logits [1, vocabulary], fp32."""
        out = model(
            input_ids=torch.tensor([list(tokens)]), past_key_values=self._cache, use_cache=True, return_dict=True
        )
        # A family with a cache of its own class makes it, and wants it back.
        self._cache = out.past_key_values
        self.lengths = [length + 1 for length in self.lengths]
        return out.logits[:, -1].float()
