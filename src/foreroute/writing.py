"""Files that are whole or not there, however the one who writes them ends; and that one process writes at a time."""

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foreroute.errors import ForerouteError

# What of a file's name its temporary one begins with: names have at most 255 bytes.
_KEPT_CHARACTERS = 40


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A new file to write: at the end of the block it is synced and takes the place of `path`.

    Where the block is left by an error (Ctrl-C is one), `path` stays as it was and nothing is left beside it. Whoever
    reads it sees the older file or the newer one. Several may write at once: the last to end stays.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(f"{path.name[:_KEPT_CHARACTERS]}.{secrets.token_hex(6)}.tmp")
    try:
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE((path if path.is_file() else beside).stat().st_mode)
        yield beside
        # Libraries make a file of their own in its place, with other permissions.
        os.chmod(beside, mode)
        _sync(beside)
        os.replace(beside, path)
        _sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as the kind of picture that the name says; PNG where it says none.

    Raises:
        ForerouteError: it cannot be written, or there is no such kind.
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
    """Another process has the claim. process_id: which, where the system says."""

    def __init__(self, process_id: int | None) -> None:
        super().__init__(process_id)
        self.process_id = process_id


class Claim:
    """The right to write a file, which is made where it is not there; held by one process, or one object, at a time.

    It is a lock on the file itself, so that none outlives its process. A lock is on what was opened, not on a name: one
    that was got after its file had been renamed or removed is no claim, and the name is opened again.

    Attributes:
        path, fd: of the file; fd is -1 when the claim is given up.
    Raises:
        ClaimedError: another has it. OSError: the file cannot be opened for writing, or cannot be locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = -1
        while not self._take():
            pass

    def rename(self, path: Path) -> None:
        """Give the file, synced, its final name, and the claim up."""
        os.fsync(self.fd)
        os.replace(self.path, path)
        _sync(path.parent)
        self.close()

    def discard(self) -> None:
        """Remove the file, and give the claim up."""
        # Renamed, the name may be another's by now.
        if self.fd >= 0 and self._is_at_its_name():
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Give the claim up; the file stays. An empty one does not: nothing was begun."""
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
        """True when the lock was got and is a claim; False when it is to be tried again."""
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
    """The process that has a file locked, by /proc/locks; None where that cannot be found out."""
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
    """Have a file, or a folder's names, on the disk and not in memory only."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
