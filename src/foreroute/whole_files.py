"""Files that are whole: text and JSON that is read as it was written, and files that are written whole or not at all.

Beside the weights a clone without git-LFS leaves a three-line pointer instead of each large file. Every read checks for
it, as it would pass for a text file, or for an empty one. Errors are one line that names the file. What is written is
complete or not there, even after a crash; and files that one process may write are locked.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from foreroute.errors import CorruptCheckpointError, ForerouteError
from foreroute.system import locks
from foreroute.system.writing import SYNC_FLAGS, WRITE_FLAGS, moves_open_files

# No config, vocabulary or index is as large; reading a larger file would only fill the memory.
_MOST_BYTES = 2**29
_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_POINTER_MOST_BYTES = 1024
_POINTER_SIZE = re.compile(rb"^size (\d{1,20})$", re.MULTILINE)

# Characters of a file's name kept in its temporary one: names have at most 255 bytes.
_KEPT_CHARACTERS = 40


def refuse_pointer(path: Path, head: bytes, error: type[ForerouteError] = CorruptCheckpointError) -> None:
    """Raise if the file at `path` is a git-LFS pointer.

    Args:
        head: the file's first bytes, all or some hundreds.
    Raises:
        error: it is a pointer; the message says which command fetches the file.
    """
    if not head.startswith(_POINTERS):
        return
    found = _POINTER_SIZE.search(head)
    size = f" of {int(found[1]):,} bytes" if found else ""
    raise error(
        f"{path} is a git-LFS pointer to a file{size}, not the file. Run `git lfs install` and `git lfs pull` in "
        f"{path.absolute().parent}, or download the file again."
    )


def check_no_pointer(path: Path, error: type[ForerouteError] = CorruptCheckpointError) -> None:
    """Raise `error` as `refuse_pointer`, if `path` (to be read by other code) is a pointer. Skips unreadable files."""
    try:
        with open(path, "rb") as file:
            head = file.read(_POINTER_MOST_BYTES)
    except OSError:
        return
    refuse_pointer(path, head, error)


def read_bytes(path: Path, error: type[ForerouteError] = CorruptCheckpointError) -> bytes:
    """Read the bytes of the file at `path`.

    Raises:
        error: it cannot be read, is too large, or a git-LFS pointer.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror}.") from failure
    if len(raw) > _MOST_BYTES:
        raise error(f"{path} has more than {_MOST_BYTES // 2**20} MiB: it is not what its name says.")
    refuse_pointer(path, raw[:_POINTER_MOST_BYTES], error)
    return raw


def read_text(path: Path, error: type[ForerouteError] = CorruptCheckpointError) -> str:
    """Read the text of the file at `path`.

    Raises:
        error: as `read_bytes`, or it is not UTF-8.
    """
    path = path.expanduser()
    try:
        return read_bytes(path, error).decode("utf-8")
    except UnicodeDecodeError as failure:
        raise error(f"{path} is not UTF-8 text (byte {failure.start}).") from None


def read_object(
    path: Path, error: type[ForerouteError] = CorruptCheckpointError, what: str = "a JSON object"
) -> dict[str, Any]:
    """Read the JSON object in the file at `path`.

    Args:
        what: the expected content, for the message.
    Raises:
        error: as `read_bytes`, or it is not such an object: damaged, truncated, not UTF-8, nested too deep.
    """
    return parse_object(read_bytes(path, error), f"{path} is not {what}", error)


def parse_object(
    raw: bytes,
    wrong: str,
    error: type[ForerouteError] = CorruptCheckpointError,
    advice: str = "Download it again.",
) -> dict[str, Any]:
    """Parse the JSON object in `raw`.

    Args:
        wrong: start of the message; the reason follows in parentheses, and then the advice.
    Raises:
        error: it is not a JSON object.
    """
    try:
        found = json.loads(raw.decode("utf-8"), parse_constant=_constant)
    except UnicodeDecodeError as failure:
        reason = f"byte {failure.start} is not UTF-8"
    except RecursionError:
        reason = "its brackets are nested too deep"
    except ValueError as failure:
        reason = _why_no_json(raw, failure)
    else:
        if isinstance(found, dict):
            return found
        reason = f"it holds {_kind(found)}"
    raise error(f"{wrong} ({reason}). {advice}")


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN stands where a number should")
    return float(name)


def _why_no_json(raw: bytes, failure: ValueError) -> str:
    if not raw.strip():
        return "it is empty"
    if isinstance(failure, json.JSONDecodeError) and not failure.doc[failure.pos :].strip():
        return "it is cut off"
    return str(failure)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def beside(model: Path, name: str) -> Path:
    """The path of a model's own file `name`: in its folder; next to a model that is a file, with that file's name."""
    return model.with_name(f"{model.name}.{name}") if model.is_file() else model / name


def check_writable(path: Path, error: type[ForerouteError], advice: str) -> None:
    """Check that a file can be made in the folder of `path`, which leaves nothing there.

    Raises:
        error: it cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as failure:
        raise error(f"{path} cannot be written: {failure.strerror}. {advice}") from failure


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

    It is a lock on the file itself (elsewhere beside it: system/locks.py), so that it ends with its process. A lock is
    on an open file, not on a name: if the file was renamed or removed before the lock was acquired, the name is opened
    again.

    Attributes:
        path, fd: of the file; fd is -1 after the claim was released.
    Raises:
        ClaimedError: another has it. OSError: the file cannot be opened for writing, or cannot be locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = -1
        self._release: Callable[[], None] = lambda: None
        while not self._take():
            pass

    def rename(self, path: Path) -> None:
        """Sync the file, rename it to `path` and release the claim. If it cannot be renamed, `close` releases it."""
        os.fsync(self.fd)
        self._make_movable()
        os.replace(self.path, path)
        _sync(path.parent)
        self._forget()

    def discard(self) -> None:
        """Remove the file and release the claim."""
        # After a rename, the name may belong to another file.
        self._end(removes=self.fd >= 0)

    def close(self) -> None:
        """Release the claim; the file stays, unless it is empty."""
        self._end(removes=self.fd >= 0 and os.fstat(self.fd).st_size == 0)

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _take(self) -> bool:
        """Try to lock the file; False if it was renamed or removed meanwhile, to try again."""
        self.fd = os.open(self.path, WRITE_FLAGS, 0o644)
        try:
            self._release = locks.hold(self.fd, self.path)
        except BlockingIOError:
            process_id = locks.holder(self.fd)
            self._forget()
            raise ClaimedError(process_id) from None
        except BaseException:
            self.close()
            raise
        if self._is_at_its_name():
            return True
        self._forget()
        return False

    def _make_movable(self) -> None:
        """Close the file where an open one is neither renamed nor removed; the lock stays."""
        if not moves_open_files():
            self._close_file()

    def _end(self, removes: bool) -> None:
        """Release the claim, also where the file was closed and then not moved; `removes` the file, if it can be."""
        try:
            if removes and self._is_at_its_name():
                self._make_movable()
                self.path.unlink()
        finally:
            self._forget()

    def _forget(self) -> None:
        release, self._release = self._release, lambda: None
        try:
            self._close_file()
        finally:
            release()

    def _close_file(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _is_at_its_name(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.fd), os.stat(self.path))
        except FileNotFoundError:
            return False


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    try:
        fd = os.open(path, SYNC_FLAGS)
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
