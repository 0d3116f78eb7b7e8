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


class IllegalEvent(AssertionError):
    """A slot was sent an event that its state does not list: our bug, never the user's."""


class NoVictim(AssertionError):
    """More slots were demanded than can be given up; the caller has to leave room. Nothing has been changed."""
