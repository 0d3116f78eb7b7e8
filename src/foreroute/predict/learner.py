"""Learn the ridge predictor online, without a fit, in time that compute stalls on reads.

Without a sidecar the lookahead predicts at once. Meanwhile rows of each layer's router input, and the next router's
logits, go to a small buffer; while compute waits for an expert, some of them are added to the layer's normal equations.
A layer with enough rows is solved in a thread, and replaces the lookahead if it predicts better on held-out rows.
Memory is bounded, except for the ridges themselves: layers are learnt in groups, one group after the other.
"""

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foreroute.model.blocks import MoeLayer
from foreroute.predict.base import Predictor, RouterSample, TokenGuess
from foreroute.predict.build import selections
from foreroute.predict.ridge import (
    NormalEquations,
    Ridge,
    RidgeLayer,
    gate_vector,
    layer_of,
)

ENOUGH_TOKENS = 8192
_BUFFER_ROWS = 256
_ROWS_ASIDE = 256
# Rows and features added at a time: about 2 ms at a hidden width of 2048, which the read of such an expert hides.
_PART_ROWS, _PART_FEATURES = 128, 256
_PENALTY = 1e-3
_FLOAT_BYTES, _DOUBLE_BYTES = 4, 8


def learning_bytes(layers: Sequence[MoeLayer], hidden: int) -> list[int]:
    """Bytes that learning takes for each of `layers` (router input `hidden` wide): sums, buffer and held-out rows.

    One layer at a time is solved, which takes `solving_bytes` more.
    """
    needed = []
    for layer, after in itertools.pairwise(layers):
        features, outputs = hidden + layer.experts.num_offloaded + 1, after.experts.num_offloaded
        needed.append((features + _BUFFER_ROWS + _ROWS_ASIDE) * (features + outputs) * _FLOAT_BYTES)
    return needed


def solving_bytes(layers: Sequence[MoeLayer], hidden: int) -> int:
    """Bytes that solving the widest of `layers` (router input `hidden` wide) takes meanwhile."""
    return max((hidden + layer.experts.num_offloaded + 1) ** 2 * _DOUBLE_BYTES for layer in layers)


class Learner:
    """A `Predictor` that starts as the lookahead and replaces it layer by layer with learnt ridges.

    Args:
        first: the predictor until then.
        max_bytes: limit for sums, buffers and solving; less than one layer's need turns learning off.
        enough_tokens: rows per layer before it is solved.

    Attributes:
        num_learnt: layers whose ridge is in use.
    """

    def __init__(
        self,
        layers: Sequence[MoeLayer],
        hidden: int,
        dtype: torch.dtype,
        first: Predictor,
        max_bytes: int,
        enough_tokens: int = ENOUGH_TOKENS,
    ) -> None:
        self._layers = layers
        self._hidden = hidden
        self._dtype = dtype
        self._first = first
        self._enough_tokens = enough_tokens
        self._ridge: list[RidgeLayer | None] = [None] * len(layers)
        self._selections = selections(layers, dtype)
        self._predictor = Ridge(self._ridge, self._selections[1:])
        self._groups = _groups(learning_bytes(layers, hidden), max_bytes - solving_bytes(layers, hidden))
        self._group: dict[int, _LayerRows] = {}
        self._logits: dict[int, torch.Tensor] = {}
        self._handles: list[Any] = []
        self._is_paused = False
        self._before: tuple[int, RouterSample] | None = None
        self._todo: Iterator[None] = iter(())
        self._thread: threading.Thread | None = None
        self.num_learnt = 0
        self._next_group()

    def guess(self, layer: int, seen: RouterSample, width: int) -> TokenGuess | None:
        """See `Predictor`."""
        if self._ridge[layer] is None:
            return self._first.guess(layer, seen, width)
        return self._predictor.guess(layer, seen, width)

    @property
    def is_learning(self) -> bool:
        """Whether some layer still needs rows."""
        return bool(self._group)

    def see(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Collect rows of MoE layer `layer`, once routed: `hidden` [tokens, hidden], `ids`, `weights` [tokens, k].

        Call it in every step. Cost: some row copies for a layer in the current group.
        """
        if self._is_paused:
            return
        rows = self._group.get(layer - 1)
        if rows is not None and self._before is not None and self._before[0] == layer - 1:
            seen = self._before[1]
            if len(seen.hidden) == len(hidden) and rows.wants_more:
                logits = self._logits.pop(layer, None)
                width = self._layers[layer].experts.num_offloaded
                rows.keep(seen, self._selections[layer].targets(logits, ids, width))
        self._before = (layer, RouterSample(hidden, ids, weights)) if layer in self._group else None

    def work(self) -> bool:
        """Do a small part of the pending work while compute waits; False when none is pending."""
        if self._is_paused:
            return False
        if next(self._todo, True) is None:
            return True
        for layer, rows in self._group.items():
            if rows.num_buffered >= _PART_ROWS:
                self._todo = rows.add_buffered()
                return next(self._todo, True) is None
            if rows.num_added >= self._enough_tokens and self._thread is None and not rows.is_solved:
                rows.is_solved = True
                self._thread = threading.Thread(
                    target=self._solve, args=(layer, rows), name="foreroute-learner", daemon=True
                )
                self._thread.start()
                return False
        if self._group and self._thread is None and all(rows.is_solved for rows in self._group.values()):
            self._next_group()
        return False

    def close(self) -> None:
        """Remove the hooks, and wait for a layer that is being solved."""
        self._stop_listening()
        self._group = {}
        thread = self._thread
        if thread is not None:
            thread.join()

    def _solve(self, layer: int, rows: "_LayerRows") -> None:
        """In a thread: solve the layer's ridge, and use it if it is better than the current predictor."""
        try:
            with torch.no_grad():
                ridge = layer_of(rows.equations, self._hidden, _PENALTY)
                seen, targets = rows.aside()
                select, top_k = self._selections[layer + 1], self._layers[layer + 1].top_k
                chosen = select(targets, top_k).ids
                learnt = select(ridge.scores(seen), top_k)
                known = self._first.guess(layer, seen._replace(hidden=seen.hidden.to(self._dtype)), top_k)
            if known is None or _found(learnt, chosen) > _found(known, chosen):
                self._predictor = Ridge([*self._ridge[:layer], ridge, *self._ridge[layer + 1 :]], self._selections[1:])
                self._ridge[layer] = ridge
                self.num_learnt += 1
        except ValueError:
            # States that are not finite: the layer keeps its current predictor.
            pass
        finally:
            self._thread = None

    def _next_group(self) -> None:
        self._stop_listening()
        group = self._groups.pop(0) if self._groups else []
        self._group = {}  # frees its memory before the next one is allocated
        self._group = {layer: _LayerRows(self._hidden, self._layers[layer], self._layers[layer + 1]) for layer in group}
        if not self._is_paused:
            self._listen()

    def pause(self) -> None:
        """Stop collecting and remove the routers' hooks until `resume`, while no guesses are used."""
        if not self._is_paused:
            self._is_paused, self._before = True, None
            self._stop_listening()

    def resume(self) -> None:
        """Collect again."""
        if self._is_paused:
            self._is_paused = False
            self._listen()

    def _listen(self) -> None:
        for layer in self._group:
            router = self._layers[layer + 1].router
            if router is not None and self._selections[layer + 1].reads_logits:
                self._handles.append(router.module.register_forward_hook(self._catching(layer + 1, router.logits_at)))

    def _catching(self, layer: int, at: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._logits[layer] = output[at].flatten(0, -2)

        return hook

    def _stop_listening(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._logits.clear()


def _found(guess: TokenGuess, chosen: torch.Tensor) -> int:
    return int((guess.ids[:, :, None] == chosen[:, None, :]).any(1).sum())


def _groups(needed: Sequence[int], max_bytes: int) -> list[list[int]]:
    """Layers in order, as many per group as fit; none where not even the largest fits alone."""
    if not needed or max(needed) > max_bytes:
        return []
    groups: list[list[int]] = [[]]
    room = max_bytes
    for layer, nbytes in enumerate(needed):
        if nbytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(layer)
        room -= nbytes
    return groups


@dataclass(frozen=True)
class _Block:
    """Rows [rows, hidden + experts + 1] and targets [rows, next experts], float32, and how many are filled."""

    rows: torch.Tensor
    targets: torch.Tensor


class _LayerRows:
    """One layer's rows: held-out ones, buffered ones, and the sums of the others."""

    def __init__(self, hidden: int, layer: MoeLayer, after: MoeLayer) -> None:
        self._num_experts = layer.experts.num_offloaded
        self._hidden = hidden
        features, outputs = hidden + self._num_experts, after.experts.num_offloaded
        self.equations = NormalEquations(features, outputs, torch.float32)
        self._buffer = _Block(
            torch.ones(_BUFFER_ROWS, features + 1, dtype=torch.float32),
            torch.zeros(_BUFFER_ROWS, outputs, dtype=torch.float32),
        )
        self._aside = _Block(
            torch.ones(_ROWS_ASIDE, features + 1, dtype=torch.float32),
            torch.zeros(_ROWS_ASIDE, outputs, dtype=torch.float32),
        )
        self.num_buffered = self.num_added = self._num_aside = 0
        self.is_solved = False

    @property
    def wants_more(self) -> bool:
        """Whether the buffer has room."""
        return self.num_buffered < _BUFFER_ROWS and not self.is_solved

    def keep(self, seen: RouterSample, targets: torch.Tensor) -> None:
        """Store as many of the tokens as fit; every eighth is held out until there are enough."""
        num_rows = min(len(targets), _BUFFER_ROWS - self.num_buffered)
        hidden, gates = (
            seen.hidden[:num_rows],
            gate_vector(RouterSample(*(one[:num_rows] for one in seen[:3])), self._num_experts),
        )
        is_aside = self._num_aside < _ROWS_ASIDE and self._num_aside * 8 <= self.num_added
        block, at = (self._aside, self._num_aside) if is_aside else (self._buffer, self.num_buffered)
        num_rows = min(num_rows, len(block.rows) - at)
        rows = slice(at, at + num_rows)
        block.rows[rows, : self._hidden] = hidden[:num_rows]
        block.rows[rows, self._hidden : -1] = gates[:num_rows]
        block.targets[rows] = targets[:num_rows]
        if is_aside:
            self._num_aside += num_rows
        else:
            self.num_buffered += num_rows

    def add_buffered(self) -> Iterator[None]:
        """Add the buffer to the sums in small parts, one for each `next`."""
        num_rows = self.num_buffered
        rows, targets = self._buffer.rows[:num_rows], self._buffer.targets[:num_rows]
        num_features = rows.shape[1]
        try:
            for start in range(0, num_rows, _PART_ROWS):
                some = slice(start, min(start + _PART_ROWS, num_rows))
                for first in range(0, num_features, _PART_FEATURES):
                    part = slice(first, min(first + _PART_FEATURES, num_features))
                    self.equations.add_part(rows[some], targets[some], part)
                    yield None
        except BaseException:
            # Interrupted: sums of which only some parts have these rows are useless.
            self.equations.gram.zero_()
            self.equations.cross.zero_()
            self.num_added = 0
            raise
        self.num_added += num_rows
        # Rows that arrived meanwhile were appended after these.
        late = self.num_buffered - num_rows
        for block in (self._buffer.rows, self._buffer.targets):
            block[:late] = block[num_rows : self.num_buffered].clone()
        self.num_buffered = late

    def aside(self) -> tuple[RouterSample, torch.Tensor]:
        """The held-out rows: this layer's samples, and the next router's logits on them."""
        rows = self._aside.rows[: self._num_aside]
        ids = torch.arange(self._num_experts).expand(len(rows), -1)
        seen = RouterSample(rows[:, : self._hidden], ids, rows[:, self._hidden : -1])
        return seen, self._aside.targets[: self._num_aside]
