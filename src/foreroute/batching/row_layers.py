"""One attention layer's keys and values for rows of different lengths, in memory that grows in steps.

transformers' own cache copies all tokens to append a new one; here it is written in place.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from foreroute.generation.kept_layers import LayerParts

# Columns that are added at a time: tokens are copied once per this many new ones.
_MORE_COLUMNS = 64
# Tokens that a row keeps before its window, so that a prompt that differs in its last ones can continue.
BEFORE_WINDOW = 16
# Memory beyond this multiple of what is needed is freed.
_LOOSE = 1.1
_CONTIGUOUS = torch.contiguous_format


class RowLengths:
    """Lengths of a cache's rows, shared by its layers.

    Attributes:
        had: tokens of each row before the current step. new: tokens that the step adds to each.
        step: number of the current or last step.
    """

    def __init__(self) -> None:
        self.step = 0
        self.had: list[int] = []
        self.new: list[int] = []

    def set(self, lengths: Sequence[int]) -> None:
        """Replace the rows by rows of these lengths."""
        self.had, self.new = list(lengths), [0] * len(lengths)

    def begin(self, new: Sequence[int]) -> None:
        """Begin a step that adds `new` tokens to each row."""
        assert [one > 0 for one in new] == [True] * len(self.had), "every row gets a token"
        self.new = list(new)
        self.step += 1

    def end(self) -> None:
        """End the step."""
        self.set([had + new for had, new in zip(self.had, self.new, strict=True)])

    @property
    def most_new(self) -> int:
        """Positions of the step: new tokens of the row that gets most."""
        return max(self.new, default=0)

    @property
    def width(self) -> int:
        """Tokens of the longest row after the step."""
        return max((had + new for had, new in zip(self.had, self.new, strict=True)), default=0)


class RowLayer(DynamicLayer):
    """[rows, heads, columns, size]: every row's tokens lie right before the column `end`.

    After a step the tokens of all rows end at one column again. A row with fewer new tokens than others is shifted to
    the right: padding is on the left alone, and distances within a row stay what they are in a single row.

    Args:
        rows: lengths, shared by all layers of a cache.
        window: of sliding attention; older tokens are not kept, but for a few (BEFORE_WINDOW).

    Attributes:
        window: as given.
    """

    def __init__(self, rows: RowLengths, window: int | None = None) -> None:
        super().__init__()
        self._rows, self.window = rows, window
        self.is_sliding = window is not None
        self._end = 0
        # The first token that a row brought, where it came with the latest alone.
        self._first: dict[int, int] = {}
        # The step that added columns last, and the column that they begin at.
        self._last_step, self._began = 0, 0

    # Called by transformers.

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [rows, heads, positions, size], of which each row's last `new` are real; return all of them."""
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
                held, shift = self._held_of(at, had), positions - new
                if held and shift:
                    states[at, :, begin - held + shift : begin + shift] = states[at, :, begin - held : begin].clone()
                # Padding is not copied: its keys may be NaN, which a weight of zero does not cancel.
                states[at, :, end - new : end] = added[at, :, shift:]
        first = end - self.get_mask_sizes(positions)[0]
        self._end = end
        self._last_step, self._began = rows.step, begin
        return self.keys[:num_rows, :, first:end], self.values[:num_rows, :, first:end]

    def get_seq_length(self) -> int:
        """Number of positions before the step's."""
        return self._rows.width - self._rows.most_new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many positions attention sees, and the first of them."""
        before = self.get_seq_length()
        first = 0 if self.window is None else max(before - self.window + 1, 0)
        return before + query_length - first, first

    # Called by `RowsCache`.

    def begin_step(self) -> None:
        """Do nothing: what a step adds is behind what was held."""

    def num_seen(self, at: int, behind: int = 0) -> int:
        """Columns that a new token of the row sees, in a step: all that it has, or a window of them.

        behind: new tokens behind that one; it sees nothing, and is padding, where there are not as many.
        """
        held = self._rows.had[at] + self._rows.new[at] - behind
        if behind >= self._rows.new[at]:
            return 0
        return held if self.window is None else min(held, self.window)

    def num_new(self, at: int) -> tuple[int, int]:
        """The row's new tokens in a step, and how many they see with themselves: all, or what is in a window."""
        new, had = self._rows.new[at], self._rows.had[at]
        return new, new + (had if self.window is None else min(had, self.window - 1))

    def join(self, new: Sequence[tuple[DynamicLayer | LayerParts | None, int]]) -> None:
        """Append rows. new: for each a layer that holds it alone, perhaps in parts, and its number of tokens."""
        if not new:
            return
        first = len(self._rows.had)
        sources = [_parts_of(layer) if had else _NOTHING for layer, had in new]
        filled = [source for source in sources if source["keys"]]
        if not self.is_initialized:
            if not filled:
                return
            self._make(filled[0]["keys"][0], filled[0]["values"][0])
        brought = [sum(part.shape[-2] for part in source["keys"]) for source in sources]
        held = [min(self._kept(had), num) for (_, had), num in zip(new, brought, strict=True)]
        self._reserve(max(held), 0, first + len(new))
        self._first |= {at: had - num for at, ((_, had), num) in enumerate(zip(new, held, strict=True), first)}
        for at, (source, num) in enumerate(zip(sources, held, strict=True), first):
            for name in ("keys", "values"):
                place, end = getattr(self, name)[at], self._end
                for part in reversed(source[name]):
                    taken = min(part.shape[-2], num - (self._end - end))
                    place[:, end - taken : end] = part[0, :, part.shape[-2] - taken :]
                    end -= taken
                # Left by an earlier row: masked, but still multiplied.
                place[:, : self._end - num] = 0

    def keep(self, places: Sequence[int]) -> None:
        """Keep the rows at these places (ascending) alone, moved together."""
        self._first = {at: self._first[place] for at, place in enumerate(places) if place in self._first}
        if not self.is_initialized:
            return
        if not places:
            # Not by transformers' own reset: 5.17 keeps the memory.
            own: Any = self
            own.keys = own.values = None
            own.is_initialized, self._end = False, 0
            return
        for at, place in enumerate(places):
            if place != at:
                for states in (self.keys, self.values):
                    states[at, :, : self._end] = states[place, :, : self._end]

    def undo_step(self) -> None:
        """Remove what the current step has added to this layer, if anything; all rows are as before it."""
        if self._last_step != self._rows.step:
            return
        begin, positions = self._began, self._end - self._began
        for at, (had, new) in enumerate(zip(self._rows.had, self._rows.new, strict=True)):
            held, shift = self._held_of(at, had), positions - new
            if held and shift:
                for states in (self.keys, self.values):
                    states[at, :, begin - held : begin] = states[at, :, begin - held + shift : begin + shift].clone()
        self._end, self._last_step = begin, 0

    def drop(self, counts: Sequence[int]) -> None:
        """Take back the last tokens of each row, of those that the last step has added."""
        if not self.is_initialized:
            return
        least = min(counts)
        end = self._end - least
        for at, count in enumerate(counts):
            held, shift = self._held_of(at, self._rows.had[at] - count), count - least
            if held and shift:
                for states in (self.keys, self.values):
                    states[at, :, end - held : end] = states[at, :, end - held - shift : end - shift].clone()
        self._end = end

    def trim(self) -> None:
        """Free memory of rows that have left, where that is worth a copy of the others."""
        if self.is_initialized:
            needed = len(self._rows.had) * (self._longest + self._ahead)
            if len(self.keys) * self.keys.shape[-2] > _LOOSE * needed:
                self._resize(self._longest, self._longest + self._ahead, len(self._rows.had))

    def row(self, at: int, like: DynamicLayer, *, is_copy: bool = True, more: int = 0) -> DynamicLayer:
        """Return a layer of the row at `at` alone, of the class of `like`: a copy, or a view until the next step.

        more: tokens before the window, if they are here.
        """
        alone: Any = copy.copy(like)
        if not self.is_initialized or self._rows.had[at] == 0:
            return alone
        num = self._held_of(at, self._rows.had[at])
        if self.window is not None:
            num = min(num, self.window - 1 + more)
        held = slice(self._end - num, self._end)
        alone.lazy_initialization(self.keys, self.values)
        alone.keys, alone.values = (states[at : at + 1, :, held] for states in (self.keys, self.values))
        if is_copy:
            alone.keys, alone.values = (one.clone(memory_format=_CONTIGUOUS) for one in (alone.keys, alone.values))
        if isinstance(alone, DynamicSlidingWindowLayer):
            alone.cumulative_length = self._rows.had[at]
        return alone

    def _held_of(self, at: int, had: int) -> int:
        """Columns of the row at `at`, of `had` tokens: what is kept of them, but for what it did not bring."""
        return min(self._kept(had), had - self._first.get(at, 0))

    def _kept(self, had: int) -> int:
        return had if self.window is None else min(had, self.window - 1 + BEFORE_WINDOW)

    @property
    def _ahead(self) -> int:
        return _MORE_COLUMNS if self.window is None else _MORE_COLUMNS - BEFORE_WINDOW

    @property
    def _longest(self) -> int:
        return max(map(self._kept, self._rows.had), default=0)

    def _make(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make empty buffers, without rows and columns, for keys and values like these."""
        self.lazy_initialization(keys, values)
        self.keys = keys.new_zeros(0, keys.shape[1], 0, keys.shape[-1])
        self.values = values.new_zeros(0, values.shape[1], 0, values.shape[-1])

    def _reserve(self, held: int, more: int, num_rows: int) -> None:
        """Grow the buffers to `num_rows` rows, `more` new tokens per row, and a new row of `held` tokens."""
        if held > self._end or self._end + more > self.keys.shape[-2] or num_rows > len(self.keys):
            # Columns out of the window, or of longer rows that have left, are dropped.
            end = max(held, self._longest)
            self._resize(end, end + more + self._ahead, num_rows)

    def _resize(self, end: int, columns: int, places: int) -> None:
        """Copy the rows to buffers of this many columns and places, their tokens right before `end`."""
        kept, num_rows = min(end, self._end), min(len(self._rows.had), len(self.keys))
        made = []
        for old in (self.keys, self.values):
            new = old.new_empty(places, old.shape[1], columns, old.shape[-1])
            new[:num_rows, :, end - kept : end] = old[:num_rows, :, self._end - kept : self._end]
            # Zeros, as padding is masked, but still multiplied.
            new[:num_rows, :, : end - kept] = 0
            new[num_rows:, :, :end] = 0
            new[:, :, end:] = 0
            made.append(new)
        # Both or neither: if memory runs out, the buffers stay as they were.
        self.keys, self.values, self._end = *made, end


_NOTHING: dict[str, Sequence[torch.Tensor]] = {"keys": (), "values": ()}


def _parts_of(source: DynamicLayer | LayerParts | None) -> Mapping[str, Sequence[torch.Tensor]]:
    """The keys and values of one row, in one part or several."""
    if isinstance(source, LayerParts) and source.parts:
        return source.parts
    layer: Any = source.layer if isinstance(source, LayerParts) else source
    if layer is None or not layer.is_initialized:
        return _NOTHING
    return {"keys": (layer.keys,), "values": (layer.values,)}
