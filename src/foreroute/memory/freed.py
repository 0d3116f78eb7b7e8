"""Give freed memory back to the system: glibc keeps most of what is freed, and a server's peak would grow with it."""

import time

from foreroute.system.memory import give_back_freed

# A walk over what is free takes some milliseconds.
_EVERY_S = 2.0


class FreedMemory:
    """Freed memory of one engine, given back now and then."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def give_back(self, *, is_idle: bool) -> None:
        """Give it back, if that was not done a moment ago, or if nothing is left to do."""
        now_s = time.monotonic()
        if is_idle or now_s - self._last_s >= _EVERY_S:
            give_back_freed()
            self._last_s = time.monotonic()
