"""Which resident expert is evicted: LRU, and LFU with decay.

Both keep one number per expert key, its *score*, that only ever grows; the victim has the lowest score, ties
by the lowest key. Scores of absent keys are kept, so an expert that is loaded again has its old score.

A `min()` over the pool would cost milliseconds per token. Instead a heap holds at most one entry per key, with the
score the key had when it was pushed. A touch changes only the score; the entry goes stale. Since scores only grow, a
stale entry is never too high, so it can only surface too early: then it is pushed again with its current score. An
entry that surfaces with a current score is the minimum.

An entry is one int, the score shifted left with the key in the low bits: a heap of ints costs half of one of tuples,
and ties break by key. Scores are kept in that form too.
"""

from collections.abc import Iterable
from heapq import heapify, heappop, heappush, heapreplace
from typing import Protocol

# The weight of a use in LFU scores, in bits: where it starts, and where all are scaled back. A use that has decayed to
# less than 2**-32 of a new one may then count as 0, and ties go by key.
_FIRST_USE_BITS = 32
_LAST_USE_BITS = 96


class Eviction(Protocol):
    """The order in which resident keys are evicted. Called by `Residency` alone, on one thread."""

    def reset(self, num_keys: int) -> None:
        """Forget everything; keys are 0..num_keys-1 from now on."""

    def touch(self, keys: Iterable[int]) -> None:
        """These keys were demanded together, resident or not. Cost: O(1) a key."""

    def add(self, keys: Iterable[int]) -> None:
        """Make these keys candidates for eviction; current candidates stay so. Cost: O(log n) a new key."""

    def pop(self) -> int:
        """Remove and return the coldest candidate, -1 if there is none. Cost: O(log n), amortised."""

    def tick(self) -> None:
        """One decode step has passed. Cost: O(1), amortised."""


class _LazyHeap:
    """A heap of candidates by score; the module's docstring says why stale entries are harmless."""

    __slots__ = ("_entries", "_heap", "_key_bits", "_key_mask", "_listed")

    def __init__(self) -> None:
        self.reset(0)

    def reset(self, num_keys: int) -> None:
        self._key_bits = max(num_keys - 1, 0).bit_length()
        self._key_mask = (1 << self._key_bits) - 1
        self._entries = list(range(num_keys))  # every score is 0
        self._heap: list[int] = []
        self._listed = bytearray(num_keys)

    def score(self, key: int) -> int:
        """The key's current score; comparable to other keys' scores only until the next `tick`."""
        return self._entries[key] >> self._key_bits

    def add(self, keys: Iterable[int]) -> None:
        heap, entries, listed = self._heap, self._entries, self._listed
        for key in keys:
            if not listed[key]:
                listed[key] = 1
                heappush(heap, entries[key])

    def pop(self) -> int:
        heap, entries, key_mask = self._heap, self._entries, self._key_mask
        while heap:
            entry = heap[0]
            key = entry & key_mask
            current = entries[key]
            if current == entry:
                heappop(heap)
                self._listed[key] = 0
                return key
            heapreplace(heap, current)
        return -1


class Lru(_LazyHeap):
    """Least recently used. Keys demanded together are equally recent."""

    __slots__ = ("_clock",)

    def reset(self, num_keys: int) -> None:
        super().reset(num_keys)
        self._clock = 0

    def touch(self, keys: Iterable[int]) -> None:
        self._clock += 1
        entries, now = self._entries, self._clock << self._key_bits
        for key in keys:
            entries[key] = now | key

    def tick(self) -> None:
        """Do nothing: recency does not decay."""


class Lfu(_LazyHeap):
    """Least frequently used; each step multiplies the weight of every earlier use by `decay`.

    The decay is applied by giving the next use 1 / decay of the weight, so that no score has to be lowered.

    Args:
        decay: in [0.5, 1]; 1 counts all uses alike.
    """

    __slots__ = ("_decay", "_use", "_use_in_place")

    def __init__(self, decay: float = 0.97) -> None:
        assert 0.5 <= decay <= 1.0, f"decay {decay} is outside [0.5, 1]"
        self._decay = decay
        super().__init__()

    def reset(self, num_keys: int) -> None:
        super().reset(num_keys)
        self._set_use(2.0**_FIRST_USE_BITS)

    def touch(self, keys: Iterable[int]) -> None:
        entries, use = self._entries, self._use_in_place
        for key in keys:
            entries[key] += use

    def tick(self) -> None:
        if self._use > 2.0**_LAST_USE_BITS:
            self._scale_back(_LAST_USE_BITS - _FIRST_USE_BITS)
        self._set_use(self._use / self._decay)

    def _set_use(self, use: float) -> None:
        self._use = use
        self._use_in_place = int(use) << self._key_bits

    def _scale_back(self, bits: int) -> None:
        """Divide all scores by 2**bits; those that become equal are ordered by key."""
        listed = [entry & self._key_mask for entry in self._heap]
        self._entries = [
            entry >> (self._key_bits + bits) << self._key_bits | key for key, entry in enumerate(self._entries)
        ]
        self._heap = [self._entries[key] for key in listed]
        heapify(self._heap)
        self._use = self._use * 2.0**-bits


def eviction_of(name: str) -> Eviction:
    """Make the eviction policy `name` (of `--eviction`)."""
    assert name in ("lru", "lfu"), f"no eviction is called {name}"
    return Lru() if name == "lru" else Lfu()
