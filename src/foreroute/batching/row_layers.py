"""One attention layer's keys and values for rows of different lengths, in memory that grows in steps.

transformers' own cache joins every new token to a copy of all that was there; here it is written to its place.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Columns that are added at a time: what is there is copied once for so many tokens.
_MORE_COLUMNS = 64
# Memory that is let go, as a multiple of what is needed.
_LOOSE = 1.1
_CONTIGUOUS = torch.contiguous_format


class RowLengths:
    """What the layers of a cache share: how long its rows are.

    Attributes:
        had: tokens of each row, those of the step that runs not counted. new: tokens that the step brings to each.
        step: a number of the step that runs, or ran last.
    """

    def __init__(self) -> None:
        self.step = 0
        self.had: list[int] = []
        self.new: list[int] = []

    def set(self, lengths: Sequence[int]) -> None:
        """Other rows are there."""
        self.had, self.new = list(lengths), [0] * len(lengths)

    def begin(self, new: Sequence[int]) -> None:
        """A step begins that brings so many tokens to each row."""
        assert [one > 0 for one in new] == [True] * len(self.had), "every row gets a token"
        self.new = list(new)
        self.step += 1

    def end(self) -> None:
        """The step is over."""
        self.set([had + new for had, new in zip(self.had, self.new, strict=True)])

    @property
    def most_new(self) -> int:
        """Positions of the step: new tokens of the row that gets most."""
        return max(self.new, default=0)

    @property
    def width(self) -> int:
        """Tokens of the longest row, when the step is over."""
        return max((had + new for had, new in zip(self.had, self.new, strict=True)), default=0)


class RowLayer(DynamicLayer):
    """[rows, heads, columns, size]: every row's tokens lie right before the column `end`.

    In a step the new tokens of all rows end at one column again. Where a row has fewer of them than others, what it
    had moves up to them: padding is on the left alone, and distances within a row are what they are alone.

    Args:
        rows: who is there; shared by all layers of a cache.
        window: of sliding attention; what is older is not kept.
    """

    def __init__(self, rows: RowLengths, window: int | None = None) -> None:
        super().__init__()
        self._rows, self._window = rows, window
        self.is_sliding = window is not None
        self._end = 0
        # The step that added columns last, and the column that they begin at.
        self._last_step, self._began = 0, 0

    # What transformers asks of a layer.

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [rows, heads, positions, size], of which each row's last `new` are its own; returns all of them."""
        rows, positions = self._rows, key_states.shape[-2]
        if not self.is_initialized:
            self._make(key_states, value_states)
        self._reserve(0, positions, len(rows.had))
        begin, end, num_rows = self._end, self._end + positions, len(rows.had)
        for states, added in ((self.keys, key_states), (self.values, value_states)):
            if min(rows.new) == positions:
                states[:num_rows, :, begin:end] = added
                continue
            for at, (had, new) in enumerate(zip(rows.had, rows.new, strict=True)):
                held, shift = self._kept(had), positions - new
                if held and shift:
                    states[at, :, begin - held + shift : begin + shift] = states[at, :, begin - held : begin].clone()
                # Padding has no keys: they may be no numbers, and no weight of nought makes these harmless.
                states[at, :, end - new : end] = added[at, :, shift:]
        first = end - self.get_mask_sizes(positions)[0]
        self._end = end
        self._last_step, self._began = rows.step, begin
        return self.keys[:num_rows, :, first:end], self.values[:num_rows, :, first:end]

    def get_seq_length(self) -> int:
        """Positions before those of the step."""
        return self._rows.width - self._rows.most_new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Positions that attention sees, and the first one of them."""
        before = self.get_seq_length()
        first = 0 if self._window is None else max(before - self._window + 1, 0)
        return before + query_length - first, first

    # What a cache of rows asks.

    def num_seen(self, at: int) -> int:
        """Columns that the row's last new token sees, in a step: all that it has, or a window of them."""
        held = self._rows.had[at] + self._rows.new[at]
        return held if self._window is None else min(held, self._window)

    def join(self, new: Sequence[tuple[DynamicLayer | None, int]]) -> None:
        """Put rows behind those that are there: a layer that holds one row, and how many tokens that row has had."""
        if not new:
            return
        first = len(self._rows.had)
        filled = [layer for layer, had in new if had and layer is not None and layer.is_initialized]
        if not self.is_initialized:
            if not filled:
                return
            self._make(filled[0].keys, filled[0].values)
        held = [self._kept(had) for _, had in new]
        self._reserve(max(held), 0, first + len(new))
        for at, ((layer, _), num) in enumerate(zip(new, held, strict=True), first):
            for name in ("keys", "values"):
                place = getattr(self, name)[at]
                if num and layer is not None:
                    place[:, self._end - num : self._end] = getattr(layer, name)[0, :, -num:]
                # What another row has left: masked, and yet multiplied.
                place[:, : self._end - num] = 0

    def keep(self, places: Sequence[int]) -> None:
        """Only the rows at these places (ascending), one behind the other."""
        if not self.is_initialized:
            return
        if not places:
            # Not as transformers lets go: 5.17 keeps the memory.
            own: Any = self
            own.keys = own.values = None
            own.is_initialized, self._end = False, 0
            return
        for at, place in enumerate(places):
            if place != at:
                for states in (self.keys, self.values):
                    states[at, :, : self._end] = states[place, :, : self._end]

    def take_back(self) -> None:
        """What the step that runs has added, if it came to this layer, is not there; all rows are as they were."""
        if self._last_step != self._rows.step:
            return
        begin, positions = self._began, self._end - self._began
        for at, (had, new) in enumerate(zip(self._rows.had, self._rows.new, strict=True)):
            held, shift = self._kept(had), positions - new
            if held and shift:
                for states in (self.keys, self.values):
                    states[at, :, begin - held : begin] = states[at, :, begin - held + shift : begin + shift].clone()
        self._end, self._last_step = begin, 0

    def trim(self) -> None:
        """Let go of memory that rows have left, where it is worth a copy of the others."""
        if self.is_initialized:
            needed = len(self._rows.had) * (self._longest + _MORE_COLUMNS)
            if len(self.keys) * self.keys.shape[-2] > _LOOSE * needed:
                self._resize(self._longest, self._longest + _MORE_COLUMNS, len(self._rows.had))

    def row(self, at: int, like: DynamicLayer, *, is_copy: bool = True) -> DynamicLayer:
        """A layer of one row alone, of the kind `like`; in memory of its own, or good until the next step."""
        alone: Any = copy.copy(like)
        if not self.is_initialized or self._rows.had[at] == 0:
            return alone
        held = slice(self._end - self._kept(self._rows.had[at]), self._end)
        alone.lazy_initialization(self.keys, self.values)
        alone.keys, alone.values = (states[at : at + 1, :, held] for states in (self.keys, self.values))
        if is_copy:
            alone.keys, alone.values = (one.clone(memory_format=_CONTIGUOUS) for one in (alone.keys, alone.values))
        if isinstance(alone, DynamicSlidingWindowLayer):
            alone.cumulative_length = self._rows.had[at]
        return alone

    def _kept(self, had: int) -> int:
        return had if self._window is None else min(had, self._window - 1)

    @property
    def _longest(self) -> int:
        return max(map(self._kept, self._rows.had), default=0)

    def _make(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Begin with no places and no columns, for keys and values of this kind."""
        self.lazy_initialization(keys, values)
        self.keys = keys.new_zeros(0, keys.shape[1], 0, keys.shape[-1])
        self.values = values.new_zeros(0, values.shape[1], 0, values.shape[-1])

    def _reserve(self, held: int, more: int, num_rows: int) -> None:
        """Let one row more have so many tokens, every row `more` behind what it has, and have places for so many."""
        if held > self._end or self._end + more > self.keys.shape[-2] or num_rows > len(self.keys):
            # What has left a window, and what was a longer row's, is left behind.
            end = max(held, self._longest)
            self._resize(end, end + more + _MORE_COLUMNS, num_rows)

    def _resize(self, end: int, columns: int, places: int) -> None:
        """So many columns and places, the tokens of the rows that are there right before `end`."""
        kept, num_rows = min(end, self._end), min(len(self._rows.had), len(self.keys))
        # Nothing but numbers: padding is masked, and yet multiplied.
        made = []
        for old in (self.keys, self.values):
            new = old.new_zeros(places, old.shape[1], columns, old.shape[-1])
            new[:num_rows, :, end - kept : end] = old[:num_rows, :, self._end - kept : self._end]
            made.append(new)
        # Both or neither: where memory runs out, what was there stays as it was.
        self.keys, self.values, self._end = *made, end
