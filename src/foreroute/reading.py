"""Read the text and JSON files beside the weights, as UTF-8, with one-line errors that name the file.

A clone without git-LFS leaves a three-line pointer instead of each large file. Every read checks for it, as it would
pass for a text file, or for an empty one.
"""

import json
import re
from pathlib import Path
from typing import Any

from foreroute.errors import CorruptCheckpointError, ForerouteError

# No config, vocabulary or index is as large; reading a larger file would only fill the memory.
_MOST_BYTES = 2**29
_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_POINTER_MOST_BYTES = 1024
_POINTER_SIZE = re.compile(rb"^size (\d{1,20})$", re.MULTILINE)


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
