"""Calls as Gemma 4 writes them: call:NAME{key:value, ...}, with texts between quotes that are a token of their own."""

import json
from typing import Any

from foreroute.server.dialogue.parsing.draft import Draft
from foreroute.server.dialogue.parsing.json_text import as_json
from foreroute.server.dialogue.parsing.reader import Steps

START, END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_DEEPEST = 32


def gemma_calls(draft: Draft) -> Steps[None]:
    """Parse such calls, each once it is whole."""
    reader = draft.reader
    while (yield from reader.until((START,), draft.content.write)) is not None:
        reader.mark()
        reader.take(len(START))
        text, _ = yield from reader.taken_until((END,))
        name, brace, _ = text.strip().removeprefix("call:").partition("{")
        arguments = _arguments(text[text.index("{") :]) if brace else None
        if arguments is None or not draft.calls.knows(name.strip()):
            reader.back()
            draft.content.write(reader.take(len(START)))
            continue
        yield from reader.next_is(END)
        draft.calls.whole(name.strip(), as_json(arguments))


def _arguments(text: str) -> dict[str, Any] | None:
    """The object that `text` writes; None: it is none."""
    try:
        value, end = _value(text, 0, 0)
    except ValueError:
        return None
    return value if isinstance(value, dict) and not text[end:].strip() else None


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends.

    Raises:
        ValueError: there is none.
    """
    at = _after_space(text, at)
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    if text.startswith(QUOTE, at):
        end = text.index(QUOTE, at + len(QUOTE))
        return text[at + len(QUOTE) : end], end + len(QUOTE)
    if text.startswith("{", at):
        return _members(text, at, depth)
    if text.startswith("[", at):
        return _items(text, at, depth)
    end = min((found for found in (text.find(one, at) for one in ",}]") if found >= 0), default=len(text))
    return json.loads(text[at:end]), end


def _members(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    at = _after_space(text, at + 1)
    while not text.startswith("}", at):
        if text.startswith(QUOTE, at):
            key, at = _value(text, at, depth)
            at = text.index(":", at)
        else:
            end = text.index(":", at)
            key, at = text[at:end].strip(), end
        found[key], at = _value(text, at + 1, depth + 1)
        at = _after_comma(text, at)
    return found, at + 1


def _items(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    at = _after_space(text, at + 1)
    while not text.startswith("]", at):
        value, at = _value(text, at, depth + 1)
        found.append(value)
        at = _after_comma(text, at)
    return found, at + 1


def _after_space(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip())


def _after_comma(text: str, at: int) -> int:
    """Where the next member begins, or the bracket that ends them.

    Raises:
        ValueError: neither follows.
    """
    at = _after_space(text, at)
    if text.startswith(",", at):
        return _after_space(text, at + 1)
    if text[at : at + 1] not in ("}", "]"):
        raise ValueError("neither a comma nor a bracket")
    return at
