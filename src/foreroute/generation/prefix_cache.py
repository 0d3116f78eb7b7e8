"""Reuse of shared prefixes: keys and values of earlier prompts are kept, and given to prompts that begin alike.

Only caches whose layers are all of a known kind are kept or continued: plain attention, which can be cut anywhere, and
a sliding window, which can be cut until a token has left the window. States of linear attention are neither: most
families drop them when several tokens follow, so that continuing them would be wrong, not just other bits.
"""

import copy
import weakref
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.caches import can_be_cut


@dataclass(frozen=True, eq=False)
class _Kept:
    """Tokens, and the cache of exactly these; never changed, only replaced."""

    model: weakref.ref[Any]
    ids: tuple[int, ...]
    cache: DynamicCache
    nbytes: int


class PromptCache:
    """Keeps the keys and values of recent conversations, the latest first; made for `generate(..., reuse=...)`.

    It serves any number of conversations, in any order, and may be shared by threads. `take` returns copies that share
    memory with what is kept but do not change it, so that an interrupted answer does no harm.

    Args:
        max_bytes: most bytes of keys and values; the least recently used conversations are dropped first, and one that
            is larger is not kept. This memory comes on top of the experts' budget.
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        assert max_bytes >= 0, "no memory is the least there is"
        self.max_bytes = max_bytes
        self._kept: list[_Kept] = []  # the latest last
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values kept."""
        with self._lock:
            return sum(kept.nbytes for kept in self._kept)

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._kept.clear()

    def take(self, model: OffloadedModel, ids: list[int], at_most: int) -> tuple[DynamicCache | None, int]:
        """Return a cache of the longest kept prefix of `ids` for this model, and its number of tokens.

        Args:
            at_most: most tokens; the rest shall be computed in any case.
        Returns:
            (None, 0) if nothing is kept.
        """
        with self._lock:
            self._kept = [kept for kept in self._kept if kept.model() is not None]
            best, most = None, 0
            for kept in self._kept:
                if kept.model() is model:
                    known = min(_common_length(kept.ids, ids), at_most)
                    if known > most and (known == len(kept.ids) or can_be_cut(kept.cache)):
                        best, most = kept, known
            if best is None:
                return None, 0
            self._kept.remove(best)
            self._kept.append(best)
        return _branch(best.cache, len(best.ids) - most), most

    def make_room(self, nbytes: int) -> bool:
        """Drop what was used least recently until `nbytes` more fit; False, and nothing is dropped, if they never do.

        For a caller that copies keys and values before `keep`.
        """
        if nbytes > self.max_bytes:
            return False
        with self._lock:
            held = sum(kept.nbytes for kept in self._kept)
            while held + nbytes > self.max_bytes:
                held -= self._kept.pop(0).nbytes
        return True

    def keep(self, model: OffloadedModel, ids: list[int], cache: DynamicCache) -> bool:
        """Keep a cache that holds at least the tokens `ids`; more, of an interrupted step, is cut off.

        Returns:
            False, and nothing is kept, if it cannot be cut safely.
        """
        whole = _cut_to(cache, len(ids)) if ids else None
        if whole is None:
            return False
        for layer in whole.layers:
            # Decoding leaves room for tokens to come (model/decode/kept_tokens.py), which is not kept.
            layer.keys, layer.values = (_without_room(part) for part in (layer.keys, layer.values))
        nbytes = sum(part.nbytes for layer in whole.layers for part in (layer.keys, layer.values))
        new = _Kept(weakref.ref(model), tuple(ids), whole, nbytes)
        if nbytes > self.max_bytes:
            return False
        can_replace = can_be_cut(whole)
        with self._lock:
            room = self.max_bytes - nbytes
            kept = [new]
            for old in reversed(self._kept):
                is_part = old.model() is model and old.ids == new.ids[: len(old.ids)]
                # The new one contains its prefix, unless that one can no longer be cut.
                if is_part and (can_replace or len(old.ids) == len(new.ids)):
                    continue
                room -= old.nbytes
                if room < 0:
                    break
                kept.append(old)
            self._kept = kept[::-1]
        return True


def _cut_to(cache: DynamicCache, length: int) -> DynamicCache | None:
    """Return a cache of exactly `length` tokens in every layer; None if some layer cannot be cut safely."""
    excess = []
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized:
            return None
        held = layer.get_seq_length()
        expected = held
        if type(layer) is DynamicSlidingWindowLayer:
            expected = min(held, layer.sliding_window - 1)
        # Ctrl-C may fall between the line that adds keys and the one that adds values.
        if held < length or layer.keys.shape[-2] != expected or layer.values.shape[-2] != expected:
            return None
        if held > length and type(layer) is DynamicSlidingWindowLayer and held >= layer.sliding_window:
            return None
        excess.append(held - length)
    branch = _branch(cache, 0)
    for layer, too_many in zip(branch.layers, excess, strict=True):
        if too_many:
            layer.crop(-too_many)
    return branch


def _without_room(states: torch.Tensor) -> torch.Tensor:
    """The same in a tensor of its own, if they are part of a larger one."""
    is_part = states.untyped_storage().nbytes() > states.nbytes
    return states.clone(memory_format=torch.contiguous_format) if is_part else states


def _branch(cache: DynamicCache, too_many: int) -> DynamicCache:
    """Return an independent cache without the last tokens: its layers replace tensors instead of changing them."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    if too_many:
        branch.crop(-too_many)
    return branch


def _common_length(left: tuple[int, ...], right: list[int]) -> int:
    return next(
        (at for at, (one, other) in enumerate(zip(left, right, strict=False)) if one != other),
        min(len(left), len(right)),
    )
