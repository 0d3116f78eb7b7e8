"""Eviction policies: LRU, LFU with decay, and by turns.

The first two keep one number per expert key, its *score*, that only ever grows; the victim has the lowest score, ties
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

from foreroute.residency.order import Eviction

# The weight of a use in LFU scores, in bits: where it starts, and where all are scaled back. A use that has decayed to
# less than 2**-32 of a new one may then count as 0, and ties go by key.
_FIRST_USE_BITS = 32
_LAST_USE_BITS = 96

# `Turns`: the weight of a use that comes a whole round of layers later.
_ROUND_LATER = 0.6
_NEVER = float("inf")


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


class Turns:
    """LFU with decay, corrected for the order of layers: each has one turn per step.

    Scores are those of `Lfu`, with two corrections. An expert that was used at its layer's last turn counts as if it
    had been used `fresh` times more, until the next turn: most reuse is by the next token. And the further off an
    expert's layer is, the less it counts: a layer just passed counts .6 of the one that comes next. The lowest is
    evicted, ties by key.

    A heap per layer holds its candidates by score: within a layer the second correction is the same for all. Losing the
    first lowers a score, so the lower entry is pushed, and the old one is skipped when it surfaces. A heap of the
    layers' lowest, rebuilt each step, finds the lowest of all.

    Args:
        keys_per_layer: width of a layer in keys.
        decay: per step, in [0.5, 1]. fresh: extra uses that a use at the last turn counts as.
    Cost: a victim O(log n), amortised; a touched key O(log n); a step O(layers).
    Source: measured on the traces of three trained models (benchmarks/eviction_study.py).
    """

    __slots__ = (
        "_bonus", "_decay", "_entries", "_fresh", "_fresh_keys", "_heaps", "_is_passed", "_key_bits", "_key_mask",
        "_listed", "_lowest", "_order", "_use", "_use_in_place", "_weights", "_weights_ahead", "_weights_passed",
        "_width",
    )  # fmt: skip

    def __init__(self, keys_per_layer: int, decay: float = 0.95, fresh: int = 4) -> None:
        assert keys_per_layer > 0, "a layer has experts"
        assert 0.5 <= decay <= 1.0, f"decay {decay} is outside [0.5, 1]"
        self._width = keys_per_layer
        self._decay = decay
        self._fresh = fresh
        self.reset(0)

    def reset(self, num_keys: int) -> None:
        """Forget everything; keys are 0..num_keys-1 from now on."""
        num_layers = -(-num_keys // self._width)
        self._key_bits = max(num_keys - 1, 0).bit_length()
        self._key_mask = (1 << self._key_bits) - 1
        self._entries = list(range(num_keys))  # every score is 0
        self._listed = bytearray(num_keys)
        self._heaps: list[list[int]] = [[] for _ in range(num_layers)]
        self._lowest: list[float] = [_NEVER] * num_layers  # per layer: a lower bound of its scores
        self._order: list[tuple[float, int]] = []  # the same, lowest first; stale entries are skipped
        self._is_passed = bytearray(num_layers)
        self._weights_ahead = [_ROUND_LATER ** (layer / num_layers) for layer in range(num_layers)]
        # Experts of a passed layer have gone one turn longer without a use than those of layers to come.
        self._weights_passed = [_ROUND_LATER * self._decay * weight for weight in self._weights_ahead]
        self._weights = list(self._weights_ahead)
        self._fresh_keys: list[list[int]] = [[] for _ in range(num_layers)]
        self._bonus = [0] * num_layers  # the extra score of each of them, shifted as in entries
        self._set_use(2.0**_FIRST_USE_BITS)

    def touch(self, keys: Iterable[int]) -> None:
        """Score these keys, demanded together, resident or not. The first touch in a step is their layer's turn."""
        keys = list(keys)
        if not keys:
            return
        entries, width, use = self._entries, self._width, self._use_in_place
        layer = min(keys) // width
        if max(keys) // width == layer and not self._is_passed[layer]:
            # The hot path: a layer's whole demand.
            self._take_turn(layer, keys)
            gain = use + self._bonus[layer]
            for key in keys:
                entries[key] += gain
            self._fresh_keys[layer] = keys
            return
        for layer in {key // width for key in keys}:
            if not self._is_passed[layer]:
                self._take_turn(layer, keys)
        for key in keys:
            entries[key] += use
            fresh = self._fresh_keys[key // width]
            if key not in fresh:
                entries[key] += self._bonus[key // width]
                fresh.append(key)

    def add(self, keys: Iterable[int]) -> None:
        """Make these keys candidates for eviction."""
        listed = self._listed
        for key in keys:
            if not listed[key]:
                listed[key] = 1
                self._push(key)

    def pop(self) -> int:
        """Remove and return the coldest candidate, -1 if there is none."""
        entries, listed, lowest, key_mask = self._entries, self._listed, self._lowest, self._key_mask
        order = self._order
        while order:
            least, layer = order[0]
            if least != lowest[layer]:
                heappop(order)
                continue
            heap = self._heaps[layer]
            is_current = True
            while heap:
                entry = heap[0]
                key = entry & key_mask
                current = entries[key]
                if listed[key] and entry == current:
                    break
                is_current = False
                if listed[key] and entry < current:
                    heapreplace(heap, current)
                else:
                    heappop(heap)
            if is_current:
                heappop(heap)
                listed[key] = 0
            if heap:
                lowest[layer] = least = heap[0] * self._weights[layer]
                heapreplace(order, (least, layer))
            else:
                lowest[layer] = _NEVER
                heappop(order)
            if is_current:
                return key
        return -1

    def tick(self) -> None:
        """Decay the scores and begin a step, with every layer to come. Cost: O(layers), amortised."""
        if self._use > 2.0**_LAST_USE_BITS:
            self._scale_back(_LAST_USE_BITS - _FIRST_USE_BITS)
        self._set_use(self._use / self._decay)
        self._is_passed = bytearray(len(self._heaps))
        self._weights = list(self._weights_ahead)
        self._lowest = [
            heap[0] * weight if heap else _NEVER for heap, weight in zip(self._heaps, self._weights, strict=True)
        ]
        self._order = [(least, layer) for layer, least in enumerate(self._lowest) if least != _NEVER]
        heapify(self._order)

    def _set_use(self, use: float) -> None:
        self._use = use
        self._use_in_place = int(use) << self._key_bits

    def _take_turn(self, layer: int, keys: list[int]) -> None:
        """Mark the layer as passed, and take the bonus from keys used at its last turn."""
        self._is_passed[layer] = 1
        self._weights[layer] = self._weights_passed[layer]
        entries, bonus, heap = self._entries, self._bonus[layer], self._heaps[layer]
        listed = self._listed
        for key in self._fresh_keys[layer]:
            entries[key] -= bonus
            if listed[key] and key not in keys:
                heappush(heap, entries[key])
        self._fresh_keys[layer] = []
        self._bonus[layer] = self._fresh * self._use_in_place
        if len(heap) > 4 * self._width:
            # Stale entries have piled up while nothing was evicted.
            self._rebuild(layer)
        heap = self._heaps[layer]
        self._lowest[layer] = _NEVER
        if heap:
            self._lowest[layer] = least = heap[0] * self._weights[layer]
            heappush(self._order, (least, layer))

    def _push(self, key: int) -> None:
        layer, entry = key // self._width, self._entries[key]
        heappush(self._heaps[layer], entry)
        worth = entry * self._weights[layer]
        if worth < self._lowest[layer]:
            self._lowest[layer] = worth
            heappush(self._order, (worth, layer))

    def _rebuild(self, layer: int) -> None:
        keys = range(layer * self._width, min((layer + 1) * self._width, len(self._entries)))
        self._heaps[layer] = [self._entries[key] for key in keys if self._listed[key]]
        heapify(self._heaps[layer])

    def _scale_back(self, bits: int) -> None:
        """Divide all scores by 2**bits; those that become equal are ordered by key."""
        shift = self._key_bits + bits
        # Scale score and bonus apart, so that a fresh key's score without the bonus is exact when that is taken.
        for layer, fresh in enumerate(self._fresh_keys):
            for key in fresh:
                self._entries[key] -= self._bonus[layer]
        self._entries = [entry >> shift << self._key_bits | key for key, entry in enumerate(self._entries)]
        self._bonus = [bonus >> shift << self._key_bits for bonus in self._bonus]
        for layer, fresh in enumerate(self._fresh_keys):
            for key in fresh:
                self._entries[key] += self._bonus[layer]
        self._use = self._use * 2.0**-bits
        for layer in range(len(self._heaps)):
            self._rebuild(layer)


def eviction_of(name: str, keys_per_layer: int) -> Eviction:
    """Make the eviction policy `name` (of `--eviction`), for layers of `keys_per_layer` keys."""
    if name == "turns":
        return Turns(keys_per_layer)
    assert name in ("lru", "lfu"), f"no eviction is called {name}"
    return Lru() if name == "lru" else Lfu()
