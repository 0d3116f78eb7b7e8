"""States of linear attention, convolutions and Mamba, one per row: without a length, and padding must not reach them.

A prompt of such a family is computed by itself, without padding; then its row joins others, which get one token each.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from foreroute.batching.row_layers import RowLayer, RowLengths
from foreroute.generation.kept_layers import LayerParts
from foreroute.model.caches import NoLayer

# What a layer holds by the number of a state; the first two are tensors [rows, ...].
_TENSORS = ("conv_states", "recurrent_states")
_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")


class RowStates(LinearAttentionLayer):
    """The states of all rows.

    Args:
        rows: lengths, shared by all layers of a cache. like: an empty layer of the family's own cache.
    """

    def __init__(self, rows: RowLengths, like: Any) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=like.number_of_states)
        self._rows = rows
        self._before: dict[str, Any] = {}
        # The recurrent states that the last step began with, and whether it gave one token to each row.
        self._began_with: tuple[bool, dict[int, torch.Tensor | None]] | None = None
        # By that: whether the family's code gives new ones (linear attention), or writes in place (Mamba's).
        self._gives_new: dict[bool, bool] = {}

    # Called by transformers.

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        """Take new states [rows, ...] in place of the old ones, which are not written: a step can be undone."""
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    # Called by `RowsCache`.

    def begin_step(self) -> None:
        """Note what `undo_step` restores: copies of what may be written in place."""
        if self._began_with is not None:
            was_single, held = self._began_with
            self._gives_new[was_single] = all(self.recurrent_states[at] is not one for at, one in held.items())
        is_single = self._rows.most_new == 1
        self._began_with = is_single, dict(self.recurrent_states)
        self._before = {name: dict(getattr(self, name)) for name in (*_TENSORS, *_FLAGS)}
        for name in _TENSORS:
            if name == "conv_states" or not self._gives_new.get(is_single):
                held = self._before[name]
                self._before[name] = {at: None if one is None else one.clone() for at, one in held.items()}

    def undo_step(self) -> None:
        """Restore the states from before the current step."""
        for name, held in self._before.items():
            setattr(self, name, held)
        self._began_with = None

    def join(self, new: Sequence[tuple[Any, int]]) -> None:
        """Append rows. new: for each a layer that holds it alone, perhaps in parts, and its number of tokens."""
        filled = [layer.layer if isinstance(layer, LayerParts) else layer for layer, had in new if had]
        if not filled:
            assert not new or not self._rows.had, "a prompt of its own"
            return
        assert len(filled) == len(new), "a prompt of its own"
        parts = [self, *filled] if self._rows.had else filled
        self._began_with = None
        for name in _FLAGS:
            setattr(self, name, dict(getattr(filled[0], name)))
        self.device, self.dtype = filled[0].device, filled[0].dtype
        for name in _TENSORS:
            held = [getattr(part, name) for part in parts]
            setattr(self, name, {at: _cat([one[at] for one in held]) for at in held[0]})

    def keep(self, places: Sequence[int]) -> None:
        """Keep the rows at these places (ascending) alone."""
        self._began_with = None
        if not places:
            LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)
            return
        for name in _TENSORS:
            held = getattr(self, name)
            for at, states in held.items():
                if states is not None and len(places) < len(states):
                    held[at] = states[list(places)]

    def trim(self) -> None:
        """Do nothing: rows that leave take their states along."""

    def row(self, at: int, like: Any, *, is_copy: bool = True, more: int = 0) -> Any:
        """Return a layer of the row at `at` alone, of the class of `like`: a copy, or a view until the next step."""
        alone = copy.copy(like)
        self._give_row(at, alone, is_copy=is_copy)
        return alone

    def _give_row(self, at: int, alone: Any, *, is_copy: bool) -> None:
        for name in _FLAGS:
            setattr(alone, name, dict(getattr(self, name)))
        alone.device, alone.dtype = self.device, self.dtype
        for name in _TENSORS:
            rows = {n: None if one is None else one[at : at + 1] for n, one in getattr(self, name).items()}
            setattr(alone, name, {n: one.clone() if is_copy and one is not None else one for n, one in rows.items()})


def _cat(states: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    held = [one for one in states if one is not None]
    return torch.cat(held) if held else None


class RowLayerWithStates(RowStates, RowLayer):
    """Keys and values, and states, of one layer."""

    def __init__(self, rows: RowLengths, like: Any) -> None:
        RowLayer.__init__(self, rows, getattr(like, "sliding_window", None))
        RowStates.__init__(self, rows, like)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Keys and values are given by position, states by name, as in transformers' own."""
        if args:
            DynamicLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def undo_step(self) -> None:
        """See the two classes."""
        RowLayer.undo_step(self)
        RowStates.undo_step(self)

    def join(self, new: Sequence[tuple[Any, int]]) -> None:
        """See the two classes."""
        RowLayer.join(self, new)
        RowStates.join(self, new)

    def keep(self, places: Sequence[int]) -> None:
        """See the two classes."""
        RowLayer.keep(self, places)
        RowStates.keep(self, places)

    def trim(self) -> None:
        """See RowLayer."""
        RowLayer.trim(self)

    def row(self, at: int, like: Any, *, is_copy: bool = True, more: int = 0) -> Any:
        """See the two classes."""
        alone = RowLayer.row(self, at, like, is_copy=is_copy, more=more)
        self._give_row(at, alone, is_copy=is_copy)
        return alone


class NoRows(NoLayer):
    """A layer that keeps nothing of its tokens."""

    def begin_step(self) -> None:
        """Do nothing, as all of these."""

    undo_step = trim = begin_step

    def join(self, new: Sequence[tuple[Any, int]]) -> None:
        """Do nothing."""

    keep = join

    def row(self, at: int, like: Any, *, is_copy: bool = True, more: int = 0) -> Any:
        """Return the layer of the row's cache, which keeps nothing either."""
        return copy.copy(like)


def rows_layer(rows: RowLengths, like: Any) -> Any:
    """The layer for several rows that serves in place of `like`, an empty one of the family's own cache."""
    if isinstance(like, NoLayer):
        return NoRows()
    if isinstance(like, LinearAttentionLayer):
        return RowLayerWithStates(rows, like) if isinstance(like, DynamicLayer) else RowStates(rows, like)
    return RowLayer(rows, getattr(like, "sliding_window", None))
