"""Files opened for O_DIRECT where they allow it, read in whole blocks."""

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

# The largest block size of common disks and file systems, and the page size that O_DIRECT buffers keep to.
BLOCK_BYTES = 4096


def round_up(num_bytes: int) -> int:
    """The next multiple of the block size."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def round_down(num_bytes: int) -> int:
    """The last multiple of the block size."""
    return num_bytes // BLOCK_BYTES * BLOCK_BYTES


class _OpenFile:
    """One file's descriptor, read by any thread that has said so; closed and opened again where there are too many.

    The first open takes the file's stamp where none is given, and every later one holds the file to it.
    """

    def __init__(self, path: str, stamp: FileStamp | None, *, direct: bool) -> None:
        self.path = path
        self.stamp = stamp
        self.is_direct = direct
        self.fd = -1
        self.users = 0
        self.last_used = 0
        self._replaced: list[int] = []  # another thread may still be reading from them

    @property
    def num_open(self) -> int:
        return len(self._replaced) + (self.fd >= 0)

    def open_descriptor(self, *, direct: bool) -> None:
        fd = -1
        if direct:
            try:
                fd, self.stamp = open_as(self.path, self.stamp, os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        is_direct = fd >= 0
        if not is_direct:
            fd, self.stamp = open_as(self.path, self.stamp)
        if self.fd >= 0:
            self._replaced.append(self.fd)
        # In this order: a thread that finds it buffered finds the descriptor that is.
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
    """Reads whole blocks of files by path. Any thread may call it.

    A file stays open, so that one that is replaced afterwards is read on as it was; after each read it is held against
    its stamp (some microseconds beside reads of 20 to 1000), so that one that is written over is found out.
    Where the process may not open so many, those used least lately are closed, and opened again if they are the same.

    Args:
        direct: try O_DIRECT; a file that refuses it is read through the page cache and listed in `buffered_paths`.
        stamps: of files that will be read, from when their headers were; each is opened at once. Others are opened at
            their first read, and taken as they are then.
    Attributes:
        retries: reads that failed and were tried again.
    Raises:
        ChangedFileError: a file is not its stamp's. ReadError: it cannot be opened.
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
        """Files that are read through the page cache, in the order in which they were first opened."""
        with self._lock:
            return [path for path, file in self._files.items() if not file.is_direct]

    def read(self, path: str, offset: int, block: memoryview, needed: int) -> int:
        """Fill a buffer from a file.

        Args:
            path: the file.
            offset: where to begin, a multiple of the block size.
            block: 4096-byte aligned, its length a multiple of that.
            needed: how many bytes of it have to be there; the rest may lie beyond the end of the file.
        Returns:
            Bytes read, at least `needed`.
        Raises:
            ChangedFileError: the file is not what it was. ReadError: it ends before that.
            OSError: the file system's own, of the last attempt where it may have passed.
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
                # A direct read has to go on at a block's start, so the last block may be read twice.
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
                return os.preadv(fd, [block], offset)
            except OSError as error:
                if error.errno == errno.EINVAL and is_direct:
                    self._open_again(file, fd, direct=False)
                    return os.preadv(file.fd, [block], offset)
                if error.errno == errno.ESTALE:
                    self._open_again(file, fd, direct=is_direct)
                raise

        return retried(read, file.path, self._count_retry)

    def _count_retry(self) -> None:
        with self._lock:
            self.retries += 1

    def _open_again(self, file: _OpenFile, fd: int, *, direct: bool) -> None:
        """Open it in place of `fd`, unless another thread has done so."""
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
        """Close files that nobody reads, least lately used first, until so many are open; how many were closed."""
        surplus = sum(file.num_open for file in self._files.values()) - down_to
        idle = sorted((f for f in self._files.values() if f.fd >= 0 and not f.users), key=lambda f: f.last_used)
        closed = idle[: max(0, surplus)]
        for file in closed:
            file.close()
        return len(closed)
