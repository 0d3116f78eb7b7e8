"""Files opened for O_DIRECT where they allow it, read in whole blocks."""

import errno
import os
import threading

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
    """One file's descriptor; read by any thread."""

    def __init__(self, path: str, direct: bool) -> None:
        self.path = path
        self.is_direct = direct
        self.fds: list[int] = []
        if direct:
            try:
                self.fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.is_direct = False
        if not self.is_direct:
            self.fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    @property
    def fd(self) -> int:
        return self.fds[-1]

    def make_buffered(self) -> None:
        """Read through the page cache from now on. The old descriptor stays open: another thread may be reading."""
        if self.is_direct:
            self.fds.append(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
            self.is_direct = False

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


class BlockFiles:
    """Reads whole blocks of files by path; each file is opened once. Any thread may call it.

    Args:
        direct: try O_DIRECT; a file that refuses it is read through the page cache and listed in `buffered_paths`.
    """

    def __init__(self, direct: bool) -> None:
        self._direct = direct
        self._lock = threading.Lock()
        self._files: dict[str, _OpenFile] = {}

    @property
    def buffered_paths(self) -> list[str]:
        """Files that are read through the page cache, in the order in which that was found out."""
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
            ReadError: the file ends before that.
            OSError: the file system's own.
        """
        file = self._open(path)
        filled = start = 0
        while filled < needed:
            try:
                num_bytes = os.preadv(file.fd, [block[start:]], offset + start)
            except OSError as error:
                if error.errno != errno.EINVAL or not file.is_direct:
                    raise
                with self._lock:
                    file.make_buffered()
                continue
            if start + num_bytes <= filled:
                raise ReadError(f"the file ends at byte {offset + filled}, {needed - filled} bytes too early")
            filled = start + num_bytes
            # A direct read has to go on at a block's start, so the last block may be read twice.
            start = round_down(filled) if file.is_direct else filled
        return filled

    def close(self) -> None:
        """Close all files. No read may be running."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _open(self, path: str) -> _OpenFile:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _OpenFile(path, self._direct)
            return file
