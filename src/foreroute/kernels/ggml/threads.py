"""How many threads multiply: all, while each has a core to itself; fewer, while other programs use the cores.

ggml's threads wait for one another by spinning, several times in every product. Where one of them has no core, the
others spin until the system gives it one, some milliseconds later: two threads on a busy machine took fifty times as
long as one (docs/LOG.md). So the time that threads wait for a core is looked at whenever a graph took too long.
"""

import os
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path

_TASKS = Path("/proc/self/task")
# A run this much slower than the quickest of its graph is looked into: factor, and seconds.
_SLOW_FACTOR, _SLOW_S = 3.0, 0.002
# Of a run's time, what its threads may have waited for cores before there are fewer of them.
_MOST_WAIT = 0.25
# Seconds between looks at idle cores, and before more threads are tried again: at first, and at most.
_LOOK_S, _RETRY_S, _MOST_RETRY_S = 0.2, 0.4, 8.0


class ThreadCount:
    """The number of threads to use now. Pure but for what it is given to look with.

    Args:
        most: threads that there are. waited_s: seconds that they have waited for a core, in all. idle_s: seconds that
            the machine's cores have been idle, in all. now_s: the clock.
    Attributes:
        active: threads to use now.
    """

    def __init__(
        self, most: int, waited_s: Callable[[], float], idle_s: Callable[[], float], now_s: Callable[[], float]
    ) -> None:
        self.active = self._most = most
        self._waited_s, self._idle_s, self._now_s = waited_s, idle_s, now_s
        self._waited_before, self._looked_at = waited_s(), now_s()
        self._retry_s = _RETRY_S
        self._retry_at, self._idle_before, self._idle_at, self._added_at = 0.0, 0.0, 0.0, -inf

    def is_slow(self, took_s: float, quickest_s: float) -> bool:
        """Whether a run should be looked into, by the quickest of the same graph."""
        return took_s > _SLOW_FACTOR * quickest_s + _SLOW_S

    def begin(self) -> None:
        """Count waits from now on: another thread calls, whose own waits before are none of these products'."""
        self._waited_before, self._looked_at = self._waited_s(), self._now_s()

    def look(self, took_s: float) -> None:
        """After a slow run: halve the threads if they waited for cores in it."""
        waited, before = self._waited_s(), self._waited_before
        now = self._now_s()
        # Threads wait a little at every wake-up: what counts is the share of all the time since the last look.
        elapsed_s = max(took_s, now - self._looked_at)
        self._waited_before, self._looked_at = waited, now
        if self.active > 1 and waited - before > _MOST_WAIT * elapsed_s:
            self.active //= 2
            # Soon after more threads were tried: the next try waits twice as long.
            is_again = now - self._added_at < _MOST_RETRY_S
            self._retry_s = min(2 * self._retry_s, _MOST_RETRY_S) if is_again else _RETRY_S
            self._idle_before, self._idle_at = self._idle_s(), now
            self._retry_at = now + self._retry_s

    def before_run(self, now_s: float) -> None:
        """With fewer threads than there are: take all again if cores for them have been idle."""
        if self.active == self._most or now_s < self._retry_at:
            return
        idle = self._idle_s()
        idle_cores = (idle - self._idle_before) / max(now_s - self._idle_at, 1e-9)
        self._idle_before, self._idle_at = idle, now_s
        self._retry_at = now_s + _LOOK_S
        if idle_cores > (self._most - self.active) * (1 - _MOST_WAIT):
            self.active, self._added_at = self._most, now_s
            self._waited_before, self._looked_at = self._waited_s(), now_s


def running_threads() -> frozenset[int]:
    """Ids of this process's threads; empty where the system does not tell (anything but Linux)."""
    if not _TASKS.is_dir():
        return frozenset()
    return frozenset(int(task) for task in os.listdir(_TASKS))


def waited_s(threads: Sequence[int]) -> float:
    """Seconds that these threads have been ready to run without a core. Cost: some 5 us a thread."""
    waited_ns = 0
    for thread in threads:
        try:
            waited_ns += int((_TASKS / str(thread) / "schedstat").read_bytes().split()[1])
        except (OSError, IndexError):  # it has ended, or the kernel does not count
            continue
    return waited_ns / 1e9


def idle_s() -> float:
    """Seconds that all cores together have been idle since the machine was started."""
    try:
        first = Path("/proc/stat").read_bytes().split(b"\n", 1)[0].split()
    except OSError:
        return 0.0
    return int(first[4]) / os.sysconf("SC_CLK_TCK")
