"""Calls as JSON objects: {"name": ..., "arguments": {...}}, one or several, after a marker or at the answer's start."""

from collections.abc import Callable
from typing import Any

from foreroute.server.dialogue.parsing.draft import Draft
from foreroute.server.dialogue.parsing.json_text import JsonScan, as_json, object_of, take_json
from foreroute.server.dialogue.parsing.reader import Steps

_KEYS = ('"arguments"', '"parameters"')


def json_calls(*starts: str, end: str = "", is_bare: bool = False) -> Callable[[Draft], Steps[None]]:
    """Make the parser of calls that follow one of `starts`, and end with `end`.

    Args:
        is_bare: an answer may begin with a call without any marker.
    """

    def parse(draft: Draft) -> Steps[None]:
        reader = draft.reader
        reader.mark()
        if is_bare and (yield from one_or_several(draft)):
            yield from reader.next_is(end, skip_space=True)
            draft.calls.settle()
        elif is_bare:
            reader.back()
        while True:
            start = yield from reader.until(starts, draft.content.write)
            if start is None:
                return
            reader.mark()
            reader.take(len(start))
            if (yield from one_or_several(draft)):
                yield from reader.next_is(end, skip_space=True)
                draft.calls.settle()
            else:
                reader.back()
                draft.content.write(reader.take(len(start)))

    return parse


def one_or_several(draft: Draft) -> Steps[int]:
    """Take calls: objects in a list, or one after another; returns how many. With none, text is left taken.

    The first of them begins at the reader's mark.
    """
    reader, count = draft.reader, 0
    is_list = yield from reader.next_is("[", skip_space=True)
    while (yield from _one(draft)):
        count += 1
        if draft.calls.is_broken:
            return count
        reader.mark()
        yield from reader.skip(" \t\r\n,;")
    if count:
        reader.back()
        if is_list:
            yield from reader.next_is("]", skip_space=True)
    return count


def _one(draft: Draft) -> Steps[bool]:
    """Take one object and add its call; False: it is none, and text is left taken."""
    reader, calls = draft.reader, draft.calls
    if (yield from reader.next_is("{", skip_space=True)) is None:
        return False
    scan, written = JsonScan(), ["{"]
    scan.follow("{")
    is_whole = yield from take_json(reader, written.append, scan, opens=1)
    if scan.depth == 1 and reader.text.startswith("{"):
        name = _name_before("".join(written))
        if name is not None and calls.knows(name):
            calls.begin(name)
            yield from take_json(reader, calls.write)
            # What is left of the outer object: its bracket, perhaps an id.
            yield from take_json(reader, written.append, scan)
            calls.end()
            return True
    if scan.depth:
        is_whole = yield from take_json(reader, written.append, scan)
    found = _call_in(object_of("".join(written))) if is_whole else None
    if found is None or not calls.knows(found[0]):
        return False
    calls.whole(*found)
    return True


def _name_before(head: str) -> str | None:
    """The name in an object whose arguments are about to begin; None: it is something else that begins."""
    at = max(head.rfind(key) for key in _KEYS)
    if at < 0 or head[at:].partition(":")[0].rstrip() not in _KEYS or head[at:].partition(":")[2].strip():
        return None
    found = (object_of(head[:at].rstrip().removesuffix(",") + "}") or {}).get("name")
    return found if isinstance(found, str) else None


def _call_in(found: dict[str, Any] | None) -> tuple[str, str] | None:
    """The name and arguments in an object; None: it is no call."""
    if found is not None and isinstance(found.get("function"), dict):
        found = found["function"]
    if found is None or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters"))
    if isinstance(arguments, str):
        return None if object_of(arguments) is None else (found["name"], arguments)
    if arguments is not None and not isinstance(arguments, dict):
        return None
    return found["name"], as_json(arguments or {})
