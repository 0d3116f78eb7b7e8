"""Several requests in one forward pass: rows of different lengths, aligned at their ends."""

import copy
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from foreroute.batching.row_attention import RowAttention, can_attend_by_row
from foreroute.batching.row_layers import RowLayer, RowLengths
from foreroute.engine.interfaces import Phase, StepInfo
from foreroute.engine.moe_step import MoeStep
from foreroute.errors import ChecksumError, ForerouteError, ReadError
from foreroute.model.caches import cache_argument, cache_of, can_be_continued, is_ordinary, new_cache

# An expert's bytes are not to be had: errors of those who want it, and of nobody else.
UNREADABLE = (ReadError, ChecksumError)


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


def can_be_padded(model: Any) -> bool:
    """Whether padding can be kept from the experts, so that prompts of different lengths may share a step."""
    return isinstance(model.foreroute.engine, MoeStep) and bool(model.foreroute.plan.math != "family")


class RowsCache:
    """The rows that are computed together; shorter ones have padding on their left, which is masked.

    Args:
        model: its requests can be batched.

    Attributes:
        lengths: tokens of each row.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        template = new_cache(model)
        assert template is not None, "the model's requests can be batched"
        self._template = template
        self._rows = RowLengths()
        self._cache = copy.copy(template)
        self._cache.layers = [RowLayer(self._rows, getattr(layer, "sliding_window", None)) for layer in template.layers]
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        # Other kernels round a row otherwise among others than alone: there it would buy nothing.
        is_alike = model.foreroute.plan.math == "ggml" and can_attend_by_row(model)
        self._attention = RowAttention(model) if is_alike else None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return list(self._rows.had)

    def arrange(self, kept: Sequence[int], new: Sequence[tuple[DynamicCache | None, int]]) -> None:
        """From now on, the rows `kept` (their places so far, ascending), and behind them new ones.

        Args:
            new: a cache of one row and the tokens that it holds; (None, 0) for a row that has none yet.
        """
        assert list(kept) == sorted(set(kept)), "rows stay in their order"
        layers: list[Any] = self._cache.layers
        # What comes is put behind the rows that are there: where memory runs out, these go on as they are.
        first = len(self._rows.had)
        for at, layer in enumerate(layers):
            layer.join([(None if cache is None else cache.layers[at], length) for cache, length in new])
        places = [*kept, *range(first, first + len(new))]
        lengths = [*self._rows.had, *(length for _, length in new)]
        for layer in layers:
            layer.keep(places)
        self._rows.set([lengths[place] for place in places])

    def take_over(self, other: "RowsCache", places: Sequence[int]) -> None:
        """Put the rows at these places of another cache behind those here; where they are all that it has, it lets go.

        That is a layer at a time, and where nothing was here not even a copy. After an error the rows here are as they
        were; the others may be lost.
        """
        is_all = len(places) == len(other._rows.had)
        if is_all and not self._rows.had:
            self._rows, self._cache, other._rows, other._cache = other._rows, other._cache, self._rows, self._cache
            return
        layers: list[Any] = self._cache.layers
        for layer, given, like in zip(layers, other._cache.layers, self._template.layers, strict=True):
            source: Any = given
            layer.join([(source.row(at, like, is_copy=False), other._rows.had[at]) for at in places])
            if is_all:
                source.keep([])
        self._rows.set([*self._rows.had, *(other._rows.had[at] for at in places)])

    def row(self, at: int, *, is_copy: bool = True) -> DynamicCache:
        """A cache of one row alone: in memory of its own, or a view of what is here, good until the next step."""
        alone = copy.copy(self._template)
        layers: list[Any] = self._cache.layers
        alone.layers = [
            layer.row(at, like, is_copy=is_copy) for layer, like in zip(layers, self._template.layers, strict=True)
        ]
        return alone

    def trim(self) -> None:
        """Let go of memory that rows have left."""
        layers: list[Any] = self._cache.layers
        for layer in layers:
            layer.trim()

    def step(self, tokens: Sequence[Sequence[int]], phase: Phase, *, all_logits: bool = False) -> torch.Tensor:
        """Compute each row's next tokens.

        Args:
            tokens: per row, at least one.
            phase: "prefill" for chunks of prompts, "decode" for one chosen token each.
            all_logits: those of every position are wanted.
        Returns:
            logits [rows, positions, vocabulary], aligned at their ends: of the longest row's tokens where all are
            wanted or the family gives no fewer, else of one.
        Raises:
            ReadError, ChecksumError: an expert could not be read; the rows are as they were.
        """
        model, rows = self._model, self._rows
        rows.begin([len(one) for one in tokens])
        device, width, most = model.device, rows.width, rows.most_new
        real = torch.tensor(rows.new, device=device)[:, None]
        total = torch.tensor([had + new for had, new in zip(rows.had, rows.new, strict=True)], device=device)[:, None]
        from_end = torch.arange(most - 1, -1, -1, device=device)[None]
        kwargs: dict[str, Any] = {"position_ids": (total - 1 - from_end).clamp(min=0)}
        by_row = self._attention if phase == "decode" and most == 1 and len(tokens) > 1 else None
        is_padded = min(rows.had[at] + rows.new[at] for at in range(len(tokens))) < width
        if is_padded and by_row is None:
            kwargs["attention_mask"] = (torch.arange(width, device=device)[None] >= width - total).long()
        if self._keeps_last and not all_logits:
            kwargs["logits_to_keep"] = 1
        ids = torch.tensor([[0] * (most - len(one)) + list(one) for one in tokens], device=device)
        padding = None
        if min(rows.new) < most:
            assert can_be_padded(model), "rows of one length, or an engine that leaves padding out"
            padding = (from_end >= real).flatten()
        info = StepInfo.of(phase, ids, padding, is_start=self._cache.get_seq_length() == 0)
        try:
            layers: list[Any] = self._cache.layers
            with model.foreroute.step(info), nullcontext() if by_row is None else by_row.over(layers):
                out = model(input_ids=ids, **cache_argument(self._cache), use_cache=True, return_dict=True, **kwargs)
        except UNREADABLE:
            self._take_back()
            raise
        rows.end()
        logits: torch.Tensor = out.logits
        return logits

    def step_apart(
        self, tokens: Sequence[Sequence[int]], phase: Phase, *, all_logits: bool = False
    ) -> list[torch.Tensor | ForerouteError]:
        """The same, each row in a step of its own: who wants an expert that cannot be read is alone with the error.

        Returns:
            Per row logits [positions, vocabulary], or why there are none; such a row is as it was.
        """
        outcomes: list[torch.Tensor | ForerouteError] = []
        together = RowsCache(self._model)
        for at, own in enumerate(tokens):
            alone = RowsCache(self._model)
            alone.arrange([], [(self.row(at, is_copy=False), self._rows.had[at])])
            try:
                outcomes.append(alone.step([own], phase, all_logits=all_logits)[0])
            except UNREADABLE as error:
                outcomes.append(error)
            together.take_over(alone, [0])
        self._rows, self._cache = together._rows, together._cache
        return outcomes

    def _take_back(self) -> None:
        layers: list[Any] = self._cache.layers
        for layer in layers:
            layer.take_back()
        self._rows.set(self._rows.had)


class OneRow:
    """In the place of `RowsCache` for a model that cannot be batched: one row, its state as the family keeps it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.lengths: list[int] = []

    def arrange(self, kept: Sequence[int], new: Sequence[tuple[Any, int]]) -> None:
        """From now on, the row that was there, or the new one."""
        if not kept:
            self._cache, self.lengths = None, []
        for cache, length in new:
            assert not self.lengths, "there is one row"
            self._cache, self.lengths = cache, [length]

    def take_over(self, other: "OneRow", places: Sequence[int]) -> None:
        """The other's row is here from now on."""
        assert not self.lengths, "there is one row"
        self._cache, self.lengths = other._cache, other.lengths

    def row(self, at: int, *, is_copy: bool = True) -> Any:
        """Its cache; never a copy."""
        return self._cache

    def trim(self) -> None:
        """There is nothing to let go."""

    def step(self, tokens: Sequence[Sequence[int]], phase: Phase, *, all_logits: bool = False) -> torch.Tensor:
        """Its next tokens; as of `RowsCache`."""
        kwargs = {"logits_to_keep": 1} if self._keeps_last and not all_logits else {}
        ids = torch.tensor([list(tokens[0])], device=self._model.device)
        cache = new_cache(self._model) if self._cache is None else self._cache
        is_start = cache is None or cache.get_seq_length() == 0
        with self._model.foreroute.step(StepInfo.of(phase, ids, is_start=is_start)):
            out = self._model(input_ids=ids, **cache_argument(cache), use_cache=True, return_dict=True, **kwargs)
        # A family with a cache of its own class makes it, and wants it back.
        self._cache = cache_of(out)
        self.lengths = [self.lengths[0] + len(tokens[0])]
        logits: torch.Tensor = out.logits
        return logits
