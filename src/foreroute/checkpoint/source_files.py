"""Open weight files and check that they have not changed since their headers were read.

A file can be replaced (another inode under its name) or overwritten (the same inode, modified later). Reading on would
silently mix the weights of two models, so that every open and every read is checked against `fstat` from when the
header was read: device, inode, size, and modification time.
"""

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from foreroute.errors import ChangedFileError, ReadError
from foreroute.system.limits import most_open_files, num_open_files, raise_open_files
from foreroute.system.reading import FILES, READ_FLAGS, open_direct

_LOG = logging.getLogger(__name__)

# Errors that a retry may pass: a disk that resets, a network file system whose server comes back.
# macOS and Windows have no EREMOTEIO.
_PASSING = ("EIO", "EREMOTEIO", "EAGAIN", "EINTR", "ETIMEDOUT", "ESTALE", "ENOBUFS")
PASSING_ERRORS = frozenset(getattr(errno, name) for name in _PASSING if hasattr(errno, name))
# Before the second, third and fourth attempt: a bus reset takes some hundred milliseconds, and a token waits for this.
RETRY_PAUSES_S = (0.01, 0.05, 0.25)
TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)
# Descriptors reserved for the rest of the process: libraries, sockets, other models.
_LEFT_TO_OTHERS = 64
_LEAST_OPEN = 4


class FileStamp(NamedTuple):
    """Identifies a file among others of the same name, and before it is written to."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, fd: int) -> "FileStamp":
        """The stamp of an open file."""
        found = os.fstat(fd)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def open_as(path: str, stamp: FileStamp | None, *, direct: bool = False) -> tuple[int, FileStamp]:
    """Open the file `path` for reading: its descriptor and stamp, which must be `stamp` if given.

    Args:
        direct: past the page cache; OSError with EINVAL where that is refused.

    Raises:
        ChangedFileError: another file than the stamp's. OSError: it cannot be opened.
    """
    fd = open_direct(path) if direct else os.open(path, READ_FLAGS)
    try:
        return fd, check_stamp(fd, path, stamp)
    except BaseException:
        os.close(fd)
        raise


def check_stamp(fd: int, path: str, stamp: FileStamp | None) -> FileStamp:
    """Return the stamp of `fd`, the open file `path`, after comparing it with `stamp` if given.

    Called after a read, it covers that read: a system sets the modification time before it writes.
    Cost: an `fstat`, 1 to 3 microseconds.

    Raises:
        ChangedFileError: they differ.
    """
    found = FileStamp.of(fd)
    if stamp is not None and found != stamp:
        raise ChangedFileError(f"{path} has changed since it was opened first: {_difference(stamp, found)}. {_AGAIN}")
    return found


_AGAIN = "Load the model again; write a new version beside the old one and rename it, then what is loaded stays right."


def _difference(before: FileStamp, now: FileStamp) -> str:
    if before[:2] != now[:2]:
        return "another file has its name now"
    if before.nbytes != now.nbytes:
        return f"it had {before.nbytes} bytes and has {now.nbytes}"
    return "it has been written to"


def retried(read: Callable[[], int], path: str, noted: Callable[[], None] = lambda: None) -> int:
    """Call `read`, up to four times if it fails for a reason that may pass, and return its result; retries are logged.

    Args:
        path: for the log. noted: called before each retry.
    Raises:
        OSError: the last attempt's.
    """
    for pause_s in RETRY_PAUSES_S:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING_ERRORS:
                raise
            _LOG.warning("A read of %s failed (%s) and is tried again.", path, error.strerror)
            noted()
            time.sleep(pause_s)
    return read()


def explained(error: OSError) -> str:
    """Describe an error of opening or reading a file, and what to do about it."""
    if error.errno in TOO_MANY_OPEN:
        soft, hard = most_open_files()
        return (
            f"{error.strerror}; the limit is {soft} (at most {hard}). Raise it (ulimit -n), or close other models and "
            "connections."
        )
    times = f", {len(RETRY_PAUSES_S) + 1} times in a row" if error.errno in PASSING_ERRORS else ""
    return f"{error.strerror}{times}. Check the disk and that the file is still there."


def room_for_files(wanted: int) -> int:
    """How many of `wanted` files can stay open at once; raises the process's soft limit if that is too low."""
    soft, hard = most_open_files()
    if soft is None:
        return wanted
    found = num_open_files()
    used = soft if found is None else found
    needed = used + wanted + _LEFT_TO_OTHERS
    raised = needed if hard is None else min(needed, hard)
    if raised > soft and raise_open_files(raised):
        soft = raised
    # Even the hard limit is too low: take half of what is free, and leave the rest for sockets and other models.
    return wanted if soft >= needed else max(_LEAST_OPEN, (soft - used) // 2)


class SourceFile:
    """One file, open for reading by one thread through the page cache. Never mapped: truncating a mapped file kills the
    process.

    Args:
        stamp: the expected stamp; None accepts the file as it is, and checks it from then on.
    Raises:
        ChangedFileError: it is another file. ReadError: it cannot be opened.
    """

    def __init__(self, path: str | Path, stamp: FileStamp | None = None) -> None:
        self.path = str(path)
        try:
            self._fd, self.stamp = open_as(self.path, stamp)
        except OSError as error:
            raise ReadError(f"{self.path} cannot be opened: {explained(error)}") from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes) from `offset`.

        Raises:
            ChangedFileError: the file was written to. ReadError: it ends too early, or the disk failed.
        """
        filled = 0
        while filled < len(buffer):
            begin = filled

            def read(begin: int = begin) -> int:
                os.lseek(self._fd, offset + begin, os.SEEK_SET)
                return FILES.readv(self._fd, [buffer[begin:]])

            try:
                count = retried(read, self.path)
            except OSError as error:
                raise ReadError(f"{self.path} cannot be read at offset {offset + begin}: {explained(error)}") from error
            if not count:
                self.check()
                raise ReadError(
                    f"{self.path} ends at byte {offset + filled}, {len(buffer) - filled} bytes too early. Get it again."
                )
            filled += count
        self.check()

    def read(self, offset: int, nbytes: int) -> bytearray:
        """Read `nbytes` bytes from `offset`; fewer where the file ends before."""
        buffer = bytearray(max(0, min(nbytes, self.stamp.nbytes - offset)))
        self.read_into(offset, memoryview(buffer))
        return buffer

    def check(self) -> None:
        """Check that the file has not changed.

        Raises:
            ChangedFileError: it has.
        """
        check_stamp(self._fd, self.path, self.stamp)

    def close(self) -> None:
        """Close it. A second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "SourceFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
