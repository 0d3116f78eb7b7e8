"""Reuse of shared prefixes: keys and values of earlier prompts are kept, and given to prompts that begin alike.

Which prompts are kept is decided by a tree over their tokens (prefix_tree.py); kept_layers.py has the tensors. Plain
attention continues after any token. A model with a sliding window, or with states of linear attention, a convolution
or Mamba, continues where its states were kept: after a chunk of a prompt, or where an answer ended.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from transformers.cache_utils import DynamicCache

from foreroute.generation.kept_layers import (
    LayerParts,
    LayerStates,
    Segment,
    continued_layer,
    continued_parts,
    is_whole,
    least_of,
    state_bytes,
    token_bytes,
)
from foreroute.generation.prefix_files import PrefixFiles, StoredNode
from foreroute.generation.prefix_tree import Found, NewState, PrefixTree
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.caches import has_state, new_cache

# Fewest tokens of a hit: a common token or two (of a role, of a text's beginning) are none.
_LEAST_HIT = 3


@dataclass(frozen=True)
class PrefixCounts:
    """Since the cache was made: prompts looked up, those of them that found a beginning, and its tokens in all."""

    lookups: int = 0
    hits: int = 0
    tokens_saved: int = 0


class Beginning(Sequence[Any]):
    """A kept beginning of a prompt: its layers, each made when it is asked for, so that only one is there twice.

    Attributes:
        length: its tokens.
    """

    def __init__(self, model: OffloadedModel, found: Found) -> None:
        empty = new_cache(model)
        assert empty is not None, "the model's caches are kept"
        self.length = found.length
        self._empty = empty
        self._segments: list[Segment] = [node.part for node in found.nodes]
        self._states: LayerStates | None = None if found.state is None else found.state.state

    def __len__(self) -> int:
        return len(self._empty.layers)

    def __getitem__(self, at: Any) -> Any:
        return continued_layer(self._empty.layers[at], at, self._segments, self.length, self._states)

    def parts(self, at: int) -> LayerParts:
        """The layer at `at`, for one who copies its tokens."""
        return continued_parts(self._empty.layers[at], at, self._segments, self.length, self._states)

    @property
    def layers(self) -> Sequence[Any]:
        """The layers, as of a cache."""
        return self

    def cache(self) -> DynamicCache:
        """A cache of all layers. It shares memory with what is kept, but does not change it."""
        self._empty.layers = list(self)
        return self._empty


class PromptCache:
    """Keeps keys and values of conversations; made for `generate(..., reuse=...)` and the server.

    It serves any number of conversations, in any order, and may be shared by threads. What several of them begin with
    is kept once. An interrupted answer does no harm to what is kept.

    Args:
        max_bytes: most bytes of keys, values and states; what was least recently used is dropped first, from the ends
            of conversations, and a conversation that is larger is not kept. This memory comes on top of the experts'
            budget.
        least_hit: fewest tokens that are worth to be found.

    Attributes:
        version: another number after each change of what is kept.
    """

    def __init__(self, max_bytes: int = 2**30, least_hit: int = _LEAST_HIT) -> None:
        assert max_bytes >= 0, "no memory is the least there is"
        self.max_bytes, self.version = max_bytes, 0
        self._tree = PrefixTree(max_bytes, least_hit)
        self._counts = PrefixCounts()
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return self._tree.nbytes

    @property
    def counts(self) -> PrefixCounts:
        """How often it was of use."""
        return self._counts

    def __len__(self) -> int:
        with self._lock:
            return len(self._tree)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self.version += 1
            self._tree.clear()

    def known(self, model: OffloadedModel, ids: Sequence[int]) -> int:
        """Number of tokens with which something that is kept begins like `ids`."""
        with self._lock:
            return self._tree.known(weakref.ref(model), ids)

    def reusable(self, model: OffloadedModel, ids: Sequence[int], at_most: int) -> int:
        """Number of tokens that `find` would find; nothing counts as used."""
        with self._lock:
            return self._tree.reusable(weakref.ref(model), ids, at_most)

    def find(self, model: OffloadedModel, ids: Sequence[int], at_most: int) -> Beginning | None:
        """Find the longest kept beginning of `ids` that `model` can continue; it counts as used.

        Args:
            at_most: most tokens; the rest shall be computed in any case.
        """
        with self._lock:
            self._forget_the_dead()
            found = self._tree.find(weakref.ref(model), ids, at_most)
            counts, length = self._counts, 0 if found is None else found.length
            self._counts = PrefixCounts(counts.lookups + 1, counts.hits + bool(length), counts.tokens_saved + length)
            return None if found is None else Beginning(model, found)

    def take(self, model: OffloadedModel, ids: list[int], at_most: int) -> tuple[DynamicCache | None, int]:
        """As `find`: a cache, and its number of tokens; (None, 0) if nothing is kept."""
        found = self.find(model, ids, at_most)
        return (None, 0) if found is None else (found.cache(), found.length)

    def keep(self, model: OffloadedModel, ids: Sequence[int], cache: DynamicCache) -> bool:
        """Keep a cache that holds at least the tokens `ids`; more, of an interrupted step, is not kept.

        Only what is not kept yet is copied.

        Returns:
            False, and nothing is kept, if it cannot be cut safely, or does not fit.
        """
        if not ids or not is_whole(cache, len(ids)):
            return False
        state = None
        if any(map(has_state, cache.layers)):
            end = len(ids)
            state = NewState(state_bytes(cache), least_of(cache, end), lambda: LayerStates.of(cache, end))
        with self._lock:
            self.version += 1
            self._forget_the_dead()
            try:
                return self._tree.insert(
                    weakref.ref(model), ids, token_bytes(cache), lambda start, end: Segment.of(cache, start, end), state
                )
            except BaseException:
                # Out of memory, or Ctrl-C, in the middle of a copy: what is kept may lack a layer.
                self._tree.clear()
                raise

    def read(self, model: OffloadedModel, files: PrefixFiles) -> int:
        """Take what an earlier process has kept of `model`; return its bytes."""
        owner = weakref.ref(model)
        with self._lock:
            self.version += 1
            before = self._tree.nbytes
            for node in files.read(model.device, self.max_bytes - before):
                self._tree.restore(owner, node.ids, node.start, node.segment, node.states, node.used)
            self._tree.prune(owner)
            return self._tree.nbytes - before

    def write(self, model: OffloadedModel, files: PrefixFiles, goes_on: Callable[[], bool] = lambda: True) -> bool:
        """Write what is kept of `model`, for a later process.

        Args:
            goes_on: asked before each file. Returns: False where it has ended the writing.
        """
        with self._lock:
            nodes = self._tree.nodes(weakref.ref(model))
        stored = [StoredNode(ids, node.start, node.part, node.state, node.used) for ids, node in nodes]
        return files.write(stored, goes_on)

    def _forget_the_dead(self) -> None:
        for owner in list(self._dead()):
            self._tree.forget(owner)

    def _dead(self) -> Iterator[Any]:
        for owner in self._tree.owners():
            if isinstance(owner, weakref.ref) and owner() is None:
                yield owner
