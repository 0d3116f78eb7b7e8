"""Write files atomically (complete or not at all, even after a crash), and lock files that one process may write."""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foreroute.errors import ForerouteError

# Characters of a file's name kept in its temporary one: names have at most 255 bytes.
_KEPT_CHARACTERS = 40


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write; at the end of the block it is synced and replaces `path`.

    If the block raises (also Ctrl-C), `path` stays unchanged and the temporary file is removed. Readers see the old
    file or the new one. Of several concurrent writers the last to finish wins.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(f"{path.name[:_KEPT_CHARACTERS]}.{secrets.token_hex(6)}.tmp")
    try:
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE((path if path.is_file() else beside).stat().st_mode)
        yield beside
        # Libraries may have replaced it by a new file with other permissions.
        os.chmod(beside, mode)
        _sync(beside)
        os.replace(beside, path)
        _sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure to `path` in the format of its suffix; PNG without one.

    Raises:
        ForerouteError: it cannot be written, or the format is unknown.
    """
    path = path if path.suffix else path.with_suffix(".png")
    try:
        with atomic_write(path) as beside:
            figure.savefig(beside, dpi=150, format=path.suffix[1:].lower())
    except OSError as error:
        raise ForerouteError(f"{path} cannot be written: {error.strerror}.") from error
    except ValueError as error:
        raise ForerouteError(f"{path} cannot be written: {error}") from error


class ClaimedError(Exception):
    """Another process has the claim. process_id: its id, if the system gives it."""

    def __init__(self, process_id: int | None) -> None:
        super().__init__(process_id)
        self.process_id = process_id


class Claim:
    """The exclusive right to write a file (made if missing), held by one process, or one object, at a time.

    It is a lock on the file itself, so that it ends with its process. A lock is on an open file, not on a name: if the
    file was renamed or removed before the lock was acquired, the name is opened again.

    Attributes:
        path, fd: of the file; fd is -1 after the claim was released.
    Raises:
        ClaimedError: another has it. OSError: the file cannot be opened for writing, or cannot be locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = -1
        while not self._take():
            pass

    def rename(self, path: Path) -> None:
        """Sync the file, rename it to `path` and release the claim."""
        os.fsync(self.fd)
        os.replace(self.path, path)
        _sync(path.parent)
        self.close()

    def discard(self) -> None:
        """Remove the file and release the claim."""
        # After a rename, the name may belong to another file.
        if self.fd >= 0 and self._is_at_its_name():
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Release the claim; the file stays, unless it is empty."""
        if self.fd < 0:
            return
        if os.fstat(self.fd).st_size == 0 and self._is_at_its_name():
            self.path.unlink()
        self._forget()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _take(self) -> bool:
        """Try to lock the file; False if it was renamed or removed meanwhile, to try again."""
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process_id = _holder(self.fd)
            self._forget()
            raise ClaimedError(process_id) from None
        except BaseException:
            self.close()
            raise
        if self._is_at_its_name():
            return True
        self._forget()
        return False

    def _forget(self) -> None:
        os.close(self.fd)
        self.fd = -1

    def _is_at_its_name(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.fd), os.stat(self.path))
        except FileNotFoundError:
            return False


def _holder(fd: int) -> int | None:
    """Return the id of the process that has a file locked, by /proc/locks; None if unknown."""
    status = os.fstat(fd)
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    fields = [line.split() for line in lines]
    pids = [int(line[4]) for line in fields if len(line) > 5 and line[1] == "FLOCK" and line[5] == file]
    return next((pid for pid in pids if pid > 0), None)


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():
            return  # it may be written to and not read: what is in it has its name all the same
        raise
    try:
        os.fsync(fd)
    except OSError as error:
        # Some file systems do not sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(fd)
