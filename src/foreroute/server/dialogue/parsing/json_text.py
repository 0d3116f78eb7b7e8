"""JSON text as it arrives: where a value ends, and control characters in strings, which models write and JSON lacks."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

from foreroute.server.dialogue.parsing.reader import Steps, TextReader

_STRUCTURE = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')
_CONTROLS = {code: json.dumps(chr(code))[1:-1] for code in range(0x20)}


class JsonScan:
    """Follows JSON text through its brackets and strings.

    Attributes:
        depth: brackets that are open.
    """

    def __init__(self) -> None:
        self.depth = 0
        self._is_string = self._is_escaped = False

    def follow(self, text: str, opens: int | None = None) -> tuple[int, str, bool]:
        """Follow `text` until the outermost bracket is closed, or one is about to be opened within `opens` others.

        Returns:
            How many characters were followed, them as valid JSON text, and whether it stopped there.
        """
        at, written = 0, []
        while at < len(text):
            if self._is_string:
                end = self._string(text, at)
                written.append(text[at:end].translate(_CONTROLS))
                at = end
                continue
            found = _STRUCTURE.search(text, at)
            if found is None:
                written.append(text[at:])
                break
            if found[0] in "{[" and self.depth == opens:
                written.append(text[at : found.start()])
                return found.start(), "".join(written), True
            written.append(text[at : found.end()])
            at = found.end()
            self._pass(found[0])
            if self.depth <= 0 and found[0] in "}]":
                return at, "".join(written), True
        return len(text), "".join(written), False

    def _pass(self, char: str) -> None:
        if char == '"':
            self._is_string = True
        else:
            self.depth += 1 if char in "{[" else -1

    def _string(self, text: str, at: int) -> int:
        """Where the text goes on after the string at `at`, or after an escape in it."""
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        found = _IN_STRING.search(text, at)
        if found is None:
            return len(text)
        if found[0] == "\\":
            self._is_escaped = True
        else:
            self._is_string = False
        return found.end()


def take_json(
    reader: TextReader, write: Callable[[str], object], scan: JsonScan | None = None, opens: int | None = None
) -> Steps[bool]:
    """Take a JSON object or array, and pass it to `write` as it comes; see `JsonScan.follow`.

    Returns:
        Whether it was complete, or stopped before a bracket.
    """
    scan = scan or JsonScan()
    while True:
        num_chars, text, has_stopped = scan.follow(reader.text, opens)
        reader.take(num_chars)
        if text:
            write(text)
        if has_stopped or reader.is_over:
            return has_stopped
        yield


def object_of(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is; None: it is none."""
    try:
        found = strict_json(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def strict_json(text: str) -> Any:
    """The value that JSON text stands for.

    Raises:
        ValueError: it is no JSON, or has a number that is not finite or half a character, which could not be sent on.
        RecursionError: it is nested too deep.
    """
    found = json.loads(text, parse_constant=_finite, parse_float=_finite)
    if "\\u" in text:
        as_json(found).encode("utf-8")  # an escape may stand for half of a pair
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def as_json(value: Any) -> str:
    """JSON text of a value."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
