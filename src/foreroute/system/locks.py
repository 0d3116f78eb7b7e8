"""Locks on files that end with their process.

Where there is `flock` the lock is on the open file itself. Windows locks bytes, which no other process can
read then: there it is on a file beside, NAME.lock, by the package filelock.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foreroute.system.modules import optional

FCNTL = optional("fcntl")
_LOCKS = Path("/proc/locks")


def hold(fd: int, path: Path) -> Callable[[], None]:
    """Lock the open file `fd` that has the name `path`, without waiting; return what releases it.

    Closing the file releases it too where the lock is on the file itself.

    Raises:
        BlockingIOError: another has it. OSError: it cannot be locked.
    """
    if FCNTL is not None:
        FCNTL.flock(fd, FCNTL.LOCK_EX | FCNTL.LOCK_NB)
        return _nothing
    filelock: Any = optional("filelock")
    # Any thread may release it; and a second object for the same file is another holder.
    lock = filelock.FileLock(f"{path}.lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path)) from error
    release: Callable[[], None] = lock.release
    return release


def is_on_the_file() -> bool:
    """Whether a lock is on the open file, whatever its name becomes; else it is on the name."""
    return FCNTL is not None


def holder(fd: int) -> int | None:
    """Return the id of the process that has an open file locked, by /proc/locks; None if unknown."""
    native: Any = os
    status = os.fstat(fd)
    try:
        lines = _LOCKS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    file = f"{native.major(status.st_dev):02x}:{native.minor(status.st_dev):02x}:{status.st_ino}"
    fields = [line.split() for line in lines]
    pids = [int(line[4]) for line in fields if len(line) > 5 and line[1] == "FLOCK" and line[5] == file]
    return next((pid for pid in pids if pid > 0), None)


def _nothing() -> None:
    """The lock ends when the file is closed."""
