"""Many tokens at once: the experts that a chunk needs pass by in ascending order, each read once.

What the pool holds is used where it is. What it lacks goes to slots that are free, and then through a small ring of
borrowed ones, so that a long prompt does not push out the experts that decoding lives on.
"""

from collections.abc import Sequence

from foreroute.engine.pool import ExpertPool

# Reads kept in flight ahead of the maths: more hide no more, they only take slots.
_RING_SLOTS = 4


class ExpertStream:
    """The experts `keys` (ascending) of one layer: ask for their slots in that order, then `close`.

    At most one expert is lent at a time: asking for the next one gives the previous one back.
    """

    def __init__(self, pool: ExpertPool, layer: int, keys: Sequence[int]) -> None:
        self._pool = pool
        ready, self._waiting, self._queue, ring = pool.admit(layer, keys, _RING_SLOTS)
        self._ready = dict(ready)  # key -> slot: pinned ones, and those in the ring
        self._ring = frozenset(ring)
        self._free = ring
        self._current = -1
        self._top_up()

    def slot_of(self, key: int) -> int:
        """The slot of expert `key`; blocks until its bytes are there.

        Raises:
            ReadError, ChecksumError: they could not be read.
        """
        if key != self._current:
            self._release_current()
            self._current = key
            self._top_up()
        while key not in self._ready:
            self._ready.update(self._pool.wait(self._waiting))
            self._top_up()
        return self._ready[key]

    def close(self) -> None:
        """Give every slot back, after the reads into them have ended."""
        self._release_current()
        self._pool.give_back(list(self._ring))
        self._pool.release([key for key, slot in self._ready.items() if slot not in self._ring])
        self._ready = {}

    def _release_current(self) -> None:
        slot = self._ready.pop(self._current, -1)
        if slot in self._ring:
            self._free.append(slot)
        elif slot >= 0:
            self._pool.release([self._current])
        self._current = -1

    def _top_up(self) -> None:
        """Start the next reads for which the ring has room."""
        while self._queue and self._free:
            key, slot = self._queue.pop(0), self._free.pop()
            self._waiting[key] = slot
            self._pool.load_borrowed(key, slot)
