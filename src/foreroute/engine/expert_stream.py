"""Stream the experts that a prompt's chunk needs through the pool in ascending order, reading each once.

Resident experts are used in place. Missing ones are read into free slots, and then through a small ring of borrowed
slots, so that a long prompt does not evict the experts that decoding needs.
"""

from collections.abc import Sequence

from foreroute.engine.pool import ExpertPool

# Reads kept in flight ahead of compute: more would hide no more time, and only take slots.
_RING_SLOTS = 4


class ExpertStream:
    """Slots of one layer's experts `keys` (ascending): call `slot_of` in that order, then `close`.

    Resident experts are held from the beginning, read ones one at a time: asking for the next one releases the previous
    one.
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
        """Return the slot of expert `key`; blocks until it is loaded.

        Raises:
            ReadError, ChecksumError: it could not be read.
        """
        if key != self._current:
            self._release_current()
            self._current = key
            self._top_up()
        while key not in self._ready:
            self._ready.update(self._pool.wait(self._waiting))
            self._top_up()
        return self._ready[key]

    def resident(self, keys: Sequence[int]) -> dict[int, int]:
        """Return key -> slot of those of `keys` that are pinned; asked before `slot_of` releases any."""
        return {key: slot for key in keys if (slot := self._ready.get(key, -1)) >= 0 and slot not in self._ring}

    def close(self) -> None:
        """Wait for the reads to end, then return all borrowed slots and release pinned experts."""
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
        """Start reads while the ring has free slots."""
        while self._queue and self._free:
            key, slot = self._queue.pop(0), self._free.pop()
            self._waiting[key] = slot
            self._pool.load_borrowed(key, slot)
