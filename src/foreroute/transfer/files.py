"""Read whole blocks of files, past the page cache (O_DIRECT on Linux) where a file allows it."""

import errno
import os
import threading
from collections.abc import Mapping

from foreroute.checkpoint.source_files import (
    TOO_MANY_OPEN,
    FileStamp,
    check_stamp,
    explained,
    open_as,
    retried,
    room_for_files,
)
from foreroute.errors import ReadError
from foreroute.system.reading import FILES
from foreroute.types import round_down


class _OpenFile:
    """One file's descriptor, shared by threads counted in `users`; closed and reopened when too many files are open.

    The first open takes the file's stamp unless one is given, and every later one checks the file against it.
    """

    def __init__(self, path: str, stamp: FileStamp | None, *, direct: bool) -> None:
        self.path = path
        self.stamp = stamp
        self.is_direct = direct
        self.fd = -1
        self.users = 0
        self.last_used = 0
        self._replaced: list[int] = []  # old descriptors that another thread may still read from

    @property
    def num_open(self) -> int:
        return len(self._replaced) + (self.fd >= 0)

    def open_descriptor(self, *, direct: bool) -> None:
        fd = -1
        if direct:
            try:
                fd, self.stamp = open_as(self.path, self.stamp, direct=True)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        is_direct = fd >= 0
        if not is_direct:
            fd, self.stamp = open_as(self.path, self.stamp)
        if self.fd >= 0:
            self._replaced.append(self.fd)
        # In this order: a thread that sees is_direct False sees the buffered descriptor too.
        self.fd = fd
        self.is_direct = is_direct

    def end_use(self) -> None:
        self.users -= 1
        if not self.users:
            while self._replaced:
                os.close(self._replaced.pop())

    def close(self) -> None:
        for fd in (*self._replaced, self.fd):
            if fd >= 0:
                os.close(fd)
        self._replaced.clear()
        self.fd = -1


class BlockFiles:
    """Reads whole blocks of files by path. Thread-safe.

    Files stay open, so that one replaced later is still read as it was; after each read a file is checked against its
    stamp (some microseconds beside reads of 20 to 1000), which detects one that was overwritten. At the process's limit
    of open files, the least recently used are closed, and reopened if unchanged.

    Args:
        direct: try O_DIRECT; a file that refuses it is read through the page cache and listed in `buffered_paths`.
        stamps: of files to be read, taken when their headers were read; each is opened at once. Other files are opened,
            and stamped, at their first read.
    Attributes:
        retries: reads that failed and were retried.
    Raises:
        ChangedFileError: a file does not match its stamp. ReadError: it cannot be opened.
    """

    def __init__(self, direct: bool, stamps: Mapping[str, FileStamp] | None = None) -> None:
        stamps = stamps or {}
        self._direct = direct
        self._lock = threading.Lock()
        self._files = {path: _OpenFile(path, stamp, direct=direct) for path, stamp in stamps.items()}
        self._most_open = room_for_files(len(stamps))
        self._uses = 0
        self.retries = 0
        try:
            for path in stamps:
                self._end_use(self._begin_use(path))
        except OSError as error:
            self.close()
            raise ReadError(f"{path} cannot be opened: {explained(error)}") from error
        except ReadError:
            self.close()
            raise

    @property
    def buffered_paths(self) -> list[str]:
        """Files read through the page cache, in the order of their first open."""
        with self._lock:
            return [path for path, file in self._files.items() if not file.is_direct]

    def read(self, path: str, offset: int, block: memoryview, needed: int) -> int:
        """Read from a file into a buffer.

        Args:
            path: the file.
            offset: where to begin, a multiple of the block size.
            block: 4096-byte aligned, its length a multiple of that.
            needed: bytes that must be read; the rest of `block` may lie beyond the end of the file.
        Returns:
            Bytes read, at least `needed`.
        Raises:
            ChangedFileError: the file has changed. ReadError: it ends before `needed` bytes.
            OSError: of the file system; if transient, of the last attempt.
        """
        file = self._begin_use(path)
        try:
            filled = start = 0
            while filled < needed:
                num_bytes = self._attempts(file, block[start:], offset + start)
                if start + num_bytes <= filled:
                    check_stamp(file.fd, path, file.stamp)
                    raise ReadError(f"the file ends at byte {offset + filled}, {needed - filled} bytes too early")
                filled = start + num_bytes
                # A direct read has to resume at a block's start, so the last block may be read twice.
                start = round_down(filled) if file.is_direct else filled
            check_stamp(file.fd, path, file.stamp)
            return filled
        finally:
            self._end_use(file)

    def close(self) -> None:
        """Close all files. No read may be running."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _attempts(self, file: _OpenFile, block: memoryview, offset: int) -> int:
        def read() -> int:
            is_direct, fd = file.is_direct, file.fd
            try:
                return FILES.preadv(fd, [block], offset)
            except OSError as error:
                if error.errno == errno.EINVAL and is_direct:
                    self._open_again(file, fd, direct=False)
                    return FILES.preadv(file.fd, [block], offset)
                if error.errno == errno.ESTALE:
                    self._open_again(file, fd, direct=is_direct)
                raise

        return retried(read, file.path, self._count_retry)

    def _count_retry(self) -> None:
        with self._lock:
            self.retries += 1

    def _open_again(self, file: _OpenFile, fd: int, *, direct: bool) -> None:
        """Reopen the file to replace `fd`, unless another thread has done so."""
        with self._lock:
            if file.fd == fd:
                self._open(file, direct=direct)

    def _begin_use(self, path: str) -> _OpenFile:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = _OpenFile(path, None, direct=self._direct)
            if file.fd < 0:
                self._open(file, direct=file.is_direct)
                self._files[path] = file
            self._uses += 1
            file.users, file.last_used = file.users + 1, self._uses
            return file

    def _end_use(self, file: _OpenFile) -> None:
        with self._lock:
            file.end_use()

    def _open(self, file: _OpenFile, *, direct: bool) -> None:
        self._close_idle(down_to=max(self._most_open, 1) - 1)
        try:
            file.open_descriptor(direct=direct)
        except OSError as error:
            if error.errno not in TOO_MANY_OPEN or not self._close_idle(down_to=0):
                raise
            file.open_descriptor(direct=direct)

    def _close_idle(self, down_to: int) -> int:
        """Close idle files, least recently used first, until `down_to` are open; return how many were closed."""
        surplus = sum(file.num_open for file in self._files.values()) - down_to
        idle = sorted((f for f in self._files.values() if f.fd >= 0 and not f.users), key=lambda f: f.last_used)
        closed = idle[: max(0, surplus)]
        for file in closed:
            file.close()
        return len(closed)
