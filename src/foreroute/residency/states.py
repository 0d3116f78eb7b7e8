"""State machine of a slot. An event that the table does not list for a state raises.

    state     LOAD      LOADED  PIN     RELEASE  EVICT  CANCEL  FAIL   BORROW    RETURN
    FREE      LOADING   .       .       .        .      .       .      BORROWED  .
    LOADING   .         READY   .       .        .      FREE    FREE   .         .
    READY     .         .       PINNED  .        FREE   .       .      .         .
    PINNED    .         .       .       READY    .      .       .      .         .
    BORROWED  .         .       .       .        .      .       .      .         FREE

LOADING: a reader may be writing to it. READY: loaded, may be evicted. PINNED: loaded and in use by compute. BORROWED:
holds no key of the pool; prefill uses it as a ring. A LOADING, READY or PINNED slot holds one key, and its state is
kept with that key; an absent key's state is FREE.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

FREE, LOADING, READY, PINNED, BORROWED = range(5)
LOAD, LOADED, PIN, RELEASE, EVICT, CANCEL, FAIL, BORROW, RETURN = range(9)
STATE_NAMES = ("free", "loading", "ready", "pinned", "borrowed")
EVENT_NAMES = ("load", "loaded", "pin", "release", "evict", "cancel", "fail", "borrow", "return")

# Above this number of slots, they are counted by state instead of listed.
_MOST_SLOTS = 32

_NO = -1
# TABLE[state][event] is the next state.
TABLE = (
    (LOADING, _NO, _NO, _NO, _NO, _NO, _NO, BORROWED, _NO),
    (_NO, READY, _NO, _NO, _NO, FREE, FREE, _NO, _NO),
    (_NO, _NO, PINNED, _NO, FREE, _NO, _NO, _NO, _NO),
    (_NO, _NO, _NO, READY, _NO, _NO, _NO, _NO, _NO),
    (_NO, _NO, _NO, _NO, _NO, _NO, _NO, _NO, FREE),
)


# Columns and cells of the table for the hot path.
AFTER_LOADED = tuple(row[LOADED] for row in TABLE)
AFTER_PIN = tuple(row[PIN] for row in TABLE)
AFTER_RELEASE = tuple(row[RELEASE] for row in TABLE)
FREE_LOAD, READY_PIN, READY_EVICT = TABLE[FREE][LOAD], TABLE[READY][PIN], TABLE[READY][EVICT]


class IllegalEvent(AssertionError):
    """A slot got an event that its state does not allow: our bug, never the user's."""


class NoVictim(AssertionError):
    """More slots were demanded than can be evicted; the caller has to leave room. Nothing has been changed."""


class LookupResult(NamedTuple):
    """Demanded keys by what was found, as (key, slot).

    hits: were READY and are PINNED now.
    in_flight: were LOADING already; the caller waits for them, then calls `loaded` and `pin`.
    misses: the caller has to load these now, then calls `loaded` and `pin`.
    """

    hits: list[tuple[int, int]]
    in_flight: list[tuple[int, int]]
    misses: list[tuple[int, int]]


def picture_of(
    slots: range, borrowed: Collection[int], slot_of: Sequence[int], state: Sequence[int], prefetched: Collection[int]
) -> str:
    """Describe what each of `slots` holds; for a large pool, count the slots per state.

    Args:
        slots: their numbers. borrowed: those of them that are. prefetched: keys.
        slot_of, state: by key; -1 for a key without a slot.
    """
    pictures = ["free"] * len(slots)
    for slot in borrowed:
        pictures[slot - slots.start] = "borrowed"
    for key, slot in enumerate(slot_of):
        if slot >= 0:
            pictures[slot - slots.start] = (
                f"{key} {'prefetched ' if key in prefetched else ''}{STATE_NAMES[state[key]]}"
            )
    if len(slots) > _MOST_SLOTS:
        states = [picture.split()[-1] for picture in pictures]
        pictures = [f"{states.count(name)} {name}" for name in STATE_NAMES if name in states]
    return ", ".join(pictures)
