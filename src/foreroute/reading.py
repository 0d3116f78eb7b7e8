"""Text and JSON beside the weights: read whole, as UTF-8; what is wrong with a file is said in a line that names it.

A clone without git-LFS leaves a pointer of three lines in place of each large file. It is told from the file itself
wherever one is read, as it would pass for a text, and often for nothing at all.
"""

import json
import re
from pathlib import Path
from typing import Any

from foreroute.errors import CorruptCheckpointError, ForerouteError

# No file of settings, vocabulary or index is as large; what is would only fill the memory.
_MOST_BYTES = 2**29
_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_POINTER_MOST_BYTES = 1024
_POINTER_SIZE = re.compile(rb"^size (\d{1,20})$", re.MULTILINE)


def refuse_pointer(path: Path, head: bytes, error: type[ForerouteError] = CorruptCheckpointError) -> None:
    """See that a file is itself, and no git-LFS pointer to it.

    Args:
        head: the file's first bytes, as many as there are or some hundreds.
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
    """As `refuse_pointer`, for a file that somebody else will read. One that cannot be opened is left to them."""
    try:
        with open(path, "rb") as file:
            head = file.read(_POINTER_MOST_BYTES)
    except OSError:
        return
    refuse_pointer(path, head, error)


def read_bytes(path: Path, error: type[ForerouteError] = CorruptCheckpointError) -> bytes:
    """A file's bytes.

    Raises:
        error: it cannot be read, is larger than any file of settings, or a git-LFS pointer.
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
    """A file's text.

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
    """The JSON object in a file.

    Args:
        what: the file should be, for the message.
    Raises:
        error: as `read_bytes`, or it is not such an object: damaged, cut off, not UTF-8, nested without end.
    """
    return parse_object(read_bytes(path, error), f"{path} is not {what}", error)


def parse_object(
    raw: bytes,
    wrong: str,
    error: type[ForerouteError] = CorruptCheckpointError,
    advice: str = "Download it again.",
) -> dict[str, Any]:
    """The JSON object in these bytes.

    Args:
        wrong: how the message begins; the reason follows in parentheses, and then the advice.
    Raises:
        error: there is none.
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
