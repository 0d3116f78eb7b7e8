"""Several requests in one forward pass: rows of different lengths, aligned at their ends."""

import copy
import inspect
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from foreroute.batching.row_attention import RowAttention, chunk_attention
from foreroute.batching.row_layers import BEFORE_WINDOW, RowLayer, RowLengths
from foreroute.batching.row_states import rows_layer
from foreroute.engine.interfaces import Phase, StepInfo
from foreroute.engine.moe_step import MoeStep
from foreroute.errors import ChecksumError, ForerouteError, ReadError
from foreroute.generation.prefix_cache import Beginning
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.caches import (
    cache_argument,
    cache_of,
    has_fixed_rows,
    has_linear_states,
    is_ordinary_on_text,
    last_logits_only,
    new_cache,
)
from foreroute.model.decode.attention import attends_by_interface

_LOG = logging.getLogger(__name__)
# Kinds of layers whose rows are independent of each other, by their names in transformers' configs.
_KINDS = frozenset({
    "full_attention", "sliding_attention", "linear_attention", "conv", "hybrid", "hybrid_sliding", "moe", "mlp",
})  # fmt: skip
# An expert cannot be read: errors of the rows that demand it alone.
UNREADABLE = (ReadError, ChecksumError)


def why_not_batched(model: OffloadedModel) -> str:
    """Why requests cannot share steps of this model; "" where they can."""
    if model.config.is_encoder_decoder:
        return "an encoder-decoder: each request is encoded first"
    cache = new_cache(model)
    if cache is None or not is_ordinary_on_text(model):
        return "the family does not keep its state in an ordinary cache"
    if not has_fixed_rows(model, cache):
        return "not all its layers are of known kinds with fixed positions"
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    if kinds - _KINDS:
        return f"its attention is of an unsupported kind ({', '.join(sorted(kinds))})"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no positions"
    return ""


def can_be_padded(model: OffloadedModel) -> bool:
    """Whether padding can be kept from experts and states, so that prompts of different lengths may share a step."""
    handle = model.foreroute
    return isinstance(handle.engine, MoeStep) and handle.plan.math != "family" and not has_linear_states(model)


class RowsCache:
    """The KV cache of rows that are computed together; shorter ones have padding on their left, which is masked.

    Args:
        model: one whose requests can be batched (`why_not_batched`).

    Attributes:
        lengths: tokens of each row.
    """

    def __init__(self, model: OffloadedModel) -> None:
        self._model = model
        template = new_cache(model)
        assert template is not None, "the model's requests can be batched"
        self._template = template
        self._rows = RowLengths()
        self._cache = copy.copy(template)
        self._cache.layers = [rows_layer(self._rows, layer) for layer in template.layers]
        self._last_only = last_logits_only(model)
        self._num_dropped = 0
        # Other kernels round a row differently in a batch than alone: attention by row would gain nothing there.
        is_alike = model.foreroute.plan.math == "ggml" and attends_by_interface(model)
        is_alike = is_alike and all(type(layer) is RowLayer for layer in self._cache.layers)
        self._attention = RowAttention(model) if is_alike else None
        self._chunks = chunk_attention(model)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return list(self._rows.had)

    def arrange(self, kept: Sequence[int], new: Sequence[tuple[DynamicCache | Beginning | None, int]]) -> None:
        """Keep the rows `kept` (their places, ascending), and append new ones.

        Args:
            new: for each row a cache of it alone and its number of tokens; (None, 0) for one without any yet.
        """
        assert list(kept) == sorted(set(kept)), "rows stay in their order"
        layers: list[Any] = self._cache.layers
        # New rows are appended first: if memory runs out, the others stay as they were.
        first = len(self._rows.had)
        for at, layer in enumerate(layers):
            layer.join([(_layer_of(cache, at), length) for cache, length in new])
        places = [*kept, *range(first, first + len(new))]
        lengths = [*self._rows.had, *(length for _, length in new)]
        for layer in layers:
            layer.keep(places)
        self._rows.set([lengths[place] for place in places])

    def append_from(self, other: "RowsCache", places: Sequence[int]) -> None:
        """Append the rows at these places of another cache; if they are all of its rows, it is emptied.

        Layer by layer, and without a copy if this cache is empty and takes all. After an error the rows here are as
        before; the others may be lost.
        """
        is_all = len(places) == len(other._rows.had)
        if is_all and not self._rows.had:
            self._rows, self._cache, other._rows, other._cache = other._rows, other._cache, self._rows, self._cache
            return
        layers: list[Any] = self._cache.layers
        for layer, given, like in zip(layers, other._cache.layers, self._template.layers, strict=True):
            source: Any = given
            rows = [source.row(at, like, is_copy=False, more=BEFORE_WINDOW) for at in places]
            layer.join([(row, other._rows.had[at]) for row, at in zip(rows, places, strict=True)])
            if is_all:
                source.keep([])
        self._rows.set([*self._rows.had, *(other._rows.had[at] for at in places)])

    def row(self, at: int, *, is_copy: bool = True, more: int = 0) -> DynamicCache:
        """Return a cache of the row at `at` alone: a copy, or a view that is valid until the next step.

        more: tokens before a window that come with it, as far as they are still there.
        """
        alone = copy.copy(self._template)
        layers: list[Any] = self._cache.layers
        alone.layers = [
            layer.row(at, like, is_copy=is_copy, more=more)
            for layer, like in zip(layers, self._template.layers, strict=True)
        ]
        return alone

    def trim(self) -> None:
        """Free memory of rows that have left."""
        layers: list[Any] = self._cache.layers
        for layer in layers:
            layer.trim()

    def step(self, tokens: Sequence[Sequence[int]], phase: Phase, *, all_logits: bool = False) -> torch.Tensor:
        """Compute each row's next tokens.

        Args:
            tokens: per row, at least one.
            phase: "prefill" for chunks of prompts, "decode" for one chosen token each, "verify" for these and
                drafted ones, which `drop` takes back.
            all_logits: return those of every position.
        Returns:
            logits [rows, positions, vocabulary], aligned at their ends: of all positions if all_logits or if the
            family cannot give fewer, else of the last one.
        Raises:
            ReadError, ChecksumError: an expert could not be read; the rows are as before.
        """
        model, rows = self._model, self._rows
        rows.begin([len(one) for one in tokens])
        device, width, most = model.device, rows.width, rows.most_new
        real = torch.tensor(rows.new, device=device)[:, None]
        total = torch.tensor([had + new for had, new in zip(rows.had, rows.new, strict=True)], device=device)[:, None]
        from_end = torch.arange(most - 1, -1, -1, device=device)[None]
        kwargs: dict[str, Any] = {"position_ids": (total - 1 - from_end).clamp(min=0)}
        if phase == "prefill":
            by_row = self._chunks if most > 1 else None
        else:
            by_row = self._attention if len(tokens) > 1 else None
        is_padded = min(rows.had[at] + rows.new[at] for at in range(len(tokens))) < width
        if is_padded and by_row is None:
            kwargs["attention_mask"] = (torch.arange(width, device=device)[None] >= width - total).long()
        if not all_logits:
            kwargs |= self._last_only
        ids = torch.tensor([[0] * (most - len(one)) + list(one) for one in tokens], device=device)
        padding = None
        if min(rows.new) < most:
            assert can_be_padded(model), "rows of one length, or an engine that leaves padding out"
            padding = (from_end >= real).flatten()
        is_start = self._cache.get_seq_length() == 0
        info = StepInfo.of(phase, ids, padding, is_start=is_start, num_dropped=self._num_dropped)
        self._num_dropped = 0
        layers: list[Any] = self._cache.layers
        for layer in layers:
            layer.begin_step()
        try:
            with model.foreroute.step(info), nullcontext() if by_row is None else by_row.over(layers):
                out = model(input_ids=ids, **cache_argument(self._cache), use_cache=True, return_dict=True, **kwargs)
        except UNREADABLE:
            self._undo_step()
            raise
        rows.end()
        logits: torch.Tensor = out.logits
        return logits

    def drop(self, counts: Sequence[int]) -> None:
        """Take back the last tokens of each row, of those that the last step has added."""
        if not any(counts):
            return
        layers: list[Any] = self._cache.layers
        for layer in layers:
            layer.drop(counts)
        self._rows.set([had - count for had, count in zip(self._rows.had, counts, strict=True)])
        # Where rows differ, guesses of some are made of an earlier place.
        self._num_dropped = max(counts)

    def step_apart(
        self, tokens: Sequence[Sequence[int]], phase: Phase, *, all_logits: bool = False
    ) -> list[torch.Tensor | ForerouteError]:
        """Compute each row in a separate step, so that only rows that demand an unreadable expert fail.

        Returns:
            Per row logits [positions, vocabulary], or the error; such a row is as before. In a verify step of several
            rows, or where only drafted tokens demand such an expert, they are those of the first position: the others
            were not computed.
        """
        outcomes: list[torch.Tensor | ForerouteError] = []
        together = RowsCache(self._model)
        for at, own in enumerate(tokens):
            alone = RowsCache(self._model)
            alone.arrange([], [(self.row(at, is_copy=False), self._rows.had[at])])
            # Beside others nothing keeps the bits of a row's several tokens as those of one by one.
            some = own[:1] if phase == "verify" and len(tokens) > 1 else own
            outcomes.append(alone._only_row(some, phase, all_logits=all_logits))
            together.append_from(alone, [0])
        self._rows, self._cache = together._rows, together._cache
        return outcomes

    def _only_row(self, tokens: Sequence[int], phase: Phase, *, all_logits: bool) -> torch.Tensor | ForerouteError:
        """See `step_apart`."""
        error: ForerouteError | None = None
        for some in [tokens, tokens[:1]] if phase == "verify" and len(tokens) > 1 else [tokens]:
            try:
                return self.step([some], phase, all_logits=all_logits)[0]
            except UNREADABLE as unreadable:
                error = unreadable
        assert error is not None, "something was tried"
        return error

    def _undo_step(self) -> None:
        layers: list[Any] = self._cache.layers
        for layer in layers:
            layer.undo_step()
        self._rows.set(self._rows.had)


def _layer_of(cache: DynamicCache | Beginning | None, at: int) -> Any:
    """A new row's layer at `at`; None without one."""
    if cache is None:
        return None
    return cache.parts(at) if isinstance(cache, Beginning) else cache.layers[at]


class OneRow:
    """Replaces `RowsCache` for a model that cannot be batched: one row, in the family's own cache."""

    def __init__(self, model: OffloadedModel) -> None:
        self._model = model
        self._cache: Any = None
        self._last_only = last_logits_only(model)
        self.lengths: list[int] = []

    def arrange(self, kept: Sequence[int], new: Sequence[tuple[Any, int]]) -> None:
        """Keep the current row, or take the new one."""
        if not kept:
            self._cache, self.lengths = None, []
        for cache, length in new:
            assert not self.lengths, "there is one row"
            self._cache = cache.cache() if isinstance(cache, Beginning) else cache
            self.lengths = [length]

    def append_from(self, other: "OneRow", places: Sequence[int]) -> None:
        """Take the other's row."""
        assert not self.lengths, "there is one row"
        self._cache, self.lengths = other._cache, other.lengths

    def row(self, at: int, *, is_copy: bool = True, more: int = 0) -> Any:
        """Return the row's cache; never a copy, and with nothing `more`."""
        return self._cache

    def drop(self, counts: Sequence[int]) -> None:
        """Do nothing: nothing is drafted."""

    def trim(self) -> None:
        """Do nothing: there is no other row's memory to free."""

    def step(self, tokens: Sequence[Sequence[int]], phase: Phase, *, all_logits: bool = False) -> torch.Tensor:
        """Compute the row's next tokens, as `RowsCache.step`."""
        kwargs = {} if all_logits else self._last_only
        ids = torch.tensor([list(tokens[0])], device=self._model.device)
        cache = new_cache(self._model) if self._cache is None else self._cache
        is_start = cache is None or cache.get_seq_length() == 0
        with self._model.foreroute.step(StepInfo.of(phase, ids, is_start=is_start)):
            out = self._model(input_ids=ids, **cache_argument(cache), use_cache=True, return_dict=True, **kwargs)
        # A family with a cache class of its own makes the cache, and expects it in the next call.
        self._cache = cache_of(out)
        self.lengths = [self.lengths[0] + len(tokens[0])]
        logits: torch.Tensor = out.logits
        return logits


def step_rows(
    rows: RowsCache | OneRow, tokens: Sequence[Sequence[int]], phase: Phase, *, all_logits: bool = False
) -> Sequence[torch.Tensor | ForerouteError]:
    """Compute a step, as `RowsCache.step`, and where an expert cannot be read the rows one by one.

    Returns:
        Per row its logits [positions, vocabulary], or the error where one of its experts cannot be read; see
        `RowsCache.step_apart`.
    Raises:
        ReadError, ChecksumError: an expert of the only row cannot be read.
    """
    try:
        return list(rows.step(tokens, phase, all_logits=all_logits))
    except UNREADABLE:
        if not isinstance(rows, RowsCache) or (len(tokens) == 1 and (phase != "verify" or len(tokens[0]) == 1)):
            raise
        _LOG.warning("an expert could not be read: the rows of this step are computed one by one")
        return rows.step_apart(tokens, phase, all_logits=all_logits)
