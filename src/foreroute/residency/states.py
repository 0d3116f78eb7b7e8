"""What may happen to a slot. The table is the whole truth; an event that a state does not list raises.

    state     LOAD      LOADED  LEASE   RELEASE  EVICT  CANCEL  FAIL   BORROW    RETURN
    FREE      LOADING   .       .       .        .      .       .      BORROWED  .
    LOADING   .         READY   .       .        .      FREE    FREE   .         .
    READY     .         .       LEASED  .        FREE   .       .      .         .
    LEASED    .         .       .       READY    .      .       .      .         .
    BORROWED  .         .       .       .        .      .       .      .         FREE

LOADING: a reader may be writing to it. READY: the bytes are there and may be given up. LEASED: they are being computed
with. BORROWED: it holds no expert; prefill uses it as a ring. A LOADING, READY or LEASED slot holds one key, and
its state is kept with that key; an absent key's state is FREE.
"""

from typing import NamedTuple

FREE, LOADING, READY, LEASED, BORROWED = range(5)
LOAD, LOADED, LEASE, RELEASE, EVICT, CANCEL, FAIL, BORROW, RETURN = range(9)
STATE_NAMES = ("free", "loading", "ready", "leased", "borrowed")
EVENT_NAMES = ("load", "loaded", "lease", "release", "evict", "cancel", "fail", "borrow", "return")

_NO = -1
# TABLE[state][event] is the next state.
TABLE = (
    (LOADING, _NO, _NO, _NO, _NO, _NO, _NO, BORROWED, _NO),
    (_NO, READY, _NO, _NO, _NO, FREE, FREE, _NO, _NO),
    (_NO, _NO, LEASED, _NO, FREE, _NO, _NO, _NO, _NO),
    (_NO, _NO, _NO, READY, _NO, _NO, _NO, _NO, _NO),
    (_NO, _NO, _NO, _NO, _NO, _NO, _NO, _NO, FREE),
)


# The hot path's columns and cells of it.
AFTER_LOADED = tuple(row[LOADED] for row in TABLE)
AFTER_LEASE = tuple(row[LEASE] for row in TABLE)
AFTER_RELEASE = tuple(row[RELEASE] for row in TABLE)
FREE_LOAD, READY_LEASE, READY_EVICT = TABLE[FREE][LOAD], TABLE[READY][LEASE], TABLE[READY][EVICT]


class IllegalEvent(AssertionError):
    """A slot was sent an event that its state does not list: our bug, never the user's."""


class NoVictim(AssertionError):
    """More slots were demanded than can be given up; the caller has to leave room. Nothing has been changed."""


class Demand(NamedTuple):
    """What became of the keys that were demanded.

    hits: keys that were READY and are LEASED now.
    late: (key, slot) that were LOADING already; to be waited for, then `loaded` and `lease`.
    misses: (key, slot) that the caller has to load now, then `loaded` and `lease`.
    """

    hits: list[int]
    late: list[tuple[int, int]]
    misses: list[tuple[int, int]]
