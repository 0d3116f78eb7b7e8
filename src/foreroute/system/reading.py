"""Files opened to be read past the page cache, and read at an offset by several threads.

| system | past the page cache | at an offset |
|---|---|---|
| Linux | O_DIRECT | os.preadv |
| macOS | F_NOCACHE, set after opening | os.preadv (11 and newer), os.pread |
| Windows | FILE_FLAG_NO_BUFFERING, by CreateFileW | seek and read under a lock |
| others | not at all: reads go through it | the first of these that is there |
"""

import errno
import io
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from foreroute.system import windows
from foreroute.system.modules import optional

FCNTL = optional("fcntl")
# Windows opens as text without O_BINARY, and has no O_CLOEXEC: there no child inherits a descriptor.
READ_FLAGS: int = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NUM_LOCKS = 64


def direct_way() -> str | None:
    """The name of this system's way past the page cache; None where it has none."""
    if hasattr(os, "O_DIRECT"):
        return "O_DIRECT"
    if hasattr(FCNTL, "F_NOCACHE"):
        return "F_NOCACHE"
    return "FILE_FLAG_NO_BUFFERING" if windows.is_here() else None


def open_direct(path: str | Path) -> int:
    """Open a file whose reads go past the page cache; offsets, lengths and addresses are then multiples of 4096.

    Raises:
        OSError: it cannot be opened; with EINVAL, the system or its file system has no such reads.
    """
    if hasattr(os, "O_DIRECT"):
        return os.open(path, READ_FLAGS | os.O_DIRECT)
    if hasattr(FCNTL, "F_NOCACHE"):
        fd = os.open(path, READ_FLAGS)
        try:
            FCNTL.fcntl(fd, FCNTL.F_NOCACHE, 1)
        except OSError as error:
            os.close(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path)) from error
        return fd
    if windows.is_here():
        return windows.open_unbuffered(str(path))
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))


class PositionalFiles(Protocol):
    """Reads and writes of `os`, under its names: `os` itself where it has them all."""

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        """Read from `offset` into buffers; any thread may do so at any time. Returns the bytes read, 0 at the end."""

    def readv(self, fd: int, buffers: Sequence[memoryview], /) -> int:
        """Read from where the file stands."""

    def pwrite(self, fd: int, data: memoryview, offset: int, /) -> int:
        """Write at `offset`; returns the bytes written."""


class EmulatedFiles:
    """The same for one buffer, on a system that lacks one of them."""

    def __init__(self) -> None:
        # Of a descriptor, by its number: a position belongs to the file, and threads share it.
        self._locks = tuple(threading.Lock() for _ in range(_NUM_LOCKS))

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int:
        """Read from `offset`."""
        (buffer,) = buffers
        if hasattr(os, "pread"):
            got = os.pread(fd, len(buffer), offset)
            buffer[: len(got)] = got
            return len(got)
        with self._locks[fd % _NUM_LOCKS]:
            os.lseek(fd, offset, os.SEEK_SET)
            return self.readv(fd, buffers)

    def readv(self, fd: int, buffers: Sequence[memoryview], /) -> int:
        """Read from where the file stands, straight into the buffer."""
        (buffer,) = buffers
        with io.FileIO(fd, closefd=False) as file:
            return file.readinto(buffer) or 0

    def pwrite(self, fd: int, data: memoryview, offset: int, /) -> int:
        """Write at `offset`."""
        with self._locks[fd % _NUM_LOCKS]:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.write(fd, data)


def positional_files() -> PositionalFiles:
    """`os`, so that nothing stands between a reader and the system; or what does the same here."""
    if hasattr(os, "preadv") and hasattr(os, "readv") and hasattr(os, "pwrite"):
        whole: Any = os
        files: PositionalFiles = whole
        return files
    return EmulatedFiles()


FILES = positional_files()
