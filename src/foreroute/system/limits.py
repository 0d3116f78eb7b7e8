"""Limits on a process: open files, processors, memory and time of children that work on what a stranger wrote."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from foreroute.system.modules import optional

RESOURCE = optional("resource")
_ALARMS: Any = signal
_IS_MACOS: bool = sys.platform == "darwin"
# Exit code of a process whose time is up, where no signal ends it.
TIME_IS_UP = 124
# Of the C library of Windows.
_MOST_FILES_ELSEWHERE = 8192
_DESCRIPTORS = ("/proc/self/fd", "/dev/fd")


def usable_processors() -> int:
    """Processors that this process may run on: by cpuset or taskset where the system has them, or all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_of_a_minute() -> float | None:
    """Programs that ran or waited for a processor, as a mean over the last minute; None where it is not counted."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def most_open_files() -> tuple[int | None, int | None]:
    """How many files this process may have open, and how far it may raise that itself; None for no limit."""
    if RESOURCE is None:
        return _MOST_FILES_ELSEWHERE, _MOST_FILES_ELSEWHERE
    soft, hard = RESOURCE.getrlimit(RESOURCE.RLIMIT_NOFILE)
    unlimited = RESOURCE.RLIM_INFINITY
    return None if soft == unlimited else soft, None if hard == unlimited else hard


def raise_open_files(most: int) -> bool:
    """Let this process have `most` files open; False where it may not."""
    if RESOURCE is None:
        return False
    with contextlib.suppress(OSError, ValueError):  # forbidden in some sandboxes
        hard = RESOURCE.getrlimit(RESOURCE.RLIMIT_NOFILE)[1]
        RESOURCE.setrlimit(RESOURCE.RLIMIT_NOFILE, (most, hard))
        return True
    return False


def num_open_files() -> int | None:
    """Descriptors that this process has open; None where the system does not say, or none is free to look."""
    for folder in _DESCRIPTORS:
        with contextlib.suppress(OSError):
            return len(os.listdir(folder))
    return None


def limit_memory(more_bytes: int) -> bool:
    """Let this process allocate at most `more_bytes` beyond what it has, and leave no core file.

    False, and no limit, on macOS and Windows, which have none for a process's own use.

    Raises:
        OSError: a system that has one does not say how much the process has.
    """
    if RESOURCE is None:
        return False
    RESOURCE.setrlimit(RESOURCE.RLIMIT_CORE, (0, 0))
    if _IS_MACOS:
        return False
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * RESOURCE.getpagesize()
    RESOURCE.setrlimit(RESOURCE.RLIMIT_AS, (held + more_bytes, held + more_bytes))
    return True


def limit_processor_time(most_s: int) -> None:
    """End this process after `most_s` seconds of a processor; elsewhere of the clock, with TIME_IS_UP."""
    if RESOURCE is None:
        end_after(most_s)
    else:
        RESOURCE.setrlimit(RESOURCE.RLIMIT_CPU, (most_s, most_s))


def end_after(most_s: float) -> Callable[[], None]:
    """End this process in `most_s` seconds of the clock, unless what is returned is called before."""
    if hasattr(_ALARMS, "setitimer"):
        _ALARMS.setitimer(_ALARMS.ITIMER_REAL, most_s)  # SIGALRM ends a process without a handler for it
        return _stop_the_alarm
    timer = threading.Timer(most_s, os._exit, (TIME_IS_UP,))
    timer.daemon = True
    timer.start()
    return timer.cancel


def _stop_the_alarm() -> None:
    _ALARMS.setitimer(_ALARMS.ITIMER_REAL, 0)


def after_fork(act: Callable[[], None]) -> None:
    """Call `act` in every child that this process forks, where it can fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=act)
