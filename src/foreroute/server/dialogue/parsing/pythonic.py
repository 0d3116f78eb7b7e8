"""Calls as a list of Python's: [get_weather(city="Paris"), ...] between two markers, as LFM2 writes them."""

import ast
from typing import Any

from foreroute.server.dialogue.parsing.draft import Draft
from foreroute.server.dialogue.parsing.json_text import as_json, object_of
from foreroute.server.dialogue.parsing.reader import Steps

START, END = "<|tool_call_start|>", "<|tool_call_end|>"
# Python's parser needs hundreds of bytes for a character.
_MOST_CHARS = 2**16


def pythonic_calls(draft: Draft) -> Steps[None]:
    """Parse such lists, each once it is whole."""
    reader = draft.reader
    while (yield from reader.until((START,), draft.content.write)) is not None:
        reader.mark()
        reader.take(len(START))
        text, _ = yield from reader.taken_until((END,))
        found = _calls_in(text)
        if not found or not all(draft.calls.knows(name) for name, _ in found):
            reader.back()
            draft.content.write(reader.take(len(START)))
            continue
        yield from reader.next_is(END)
        for name, arguments in found:
            draft.calls.whole(name, arguments)


def _calls_in(text: str) -> list[tuple[str, str]]:
    """The names and arguments of the calls in a list; none where it is anything else."""
    if len(text) > _MOST_CHARS:
        return []
    try:
        parsed = ast.parse(text.strip(), mode="eval").body
        calls = parsed.elts if isinstance(parsed, ast.List) else [parsed]
        found = [_call_of(one) for one in calls]
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return []
    return [one for one in found if one is not None] if None not in found else []


def _call_of(node: ast.expr) -> tuple[str, str] | None:
    if not isinstance(node, ast.Call) or node.args or any(one.arg is None for one in node.keywords):
        return None
    arguments: dict[Any, Any] = {one.arg: ast.literal_eval(one.value) for one in node.keywords}
    text = as_json(arguments)
    return (ast.unparse(node.func), text) if object_of(text) is not None else None
