"""Calls as tags around a name, keys and values: Qwen3-Coder's, GLM's, MiniMax's, DeepSeek-V3.2's."""

from collections.abc import Callable
from dataclasses import dataclass

from foreroute.server.dialogue.parsing.draft import Calls, Draft
from foreroute.server.dialogue.parsing.json_text import as_json
from foreroute.server.dialogue.parsing.reader import Steps
from foreroute.server.dialogue.parsing.values import is_text, value_of


@dataclass(frozen=True)
class CallTags:
    """How calls are written.

    block, block_end: around one call or several. call: before a name; "": it follows the block's tag. name_ends: what
    ends a name; kept_ends: those of them that belong to what follows. key, key_end, value, value_end: around a key and
    its value. call_end: after the last. is_on_lines: a value stands between two newlines that are not part of it.
    """

    block: str
    block_end: str
    call: str
    name_ends: tuple[str, ...]
    key: str
    key_end: str
    value_end: str
    call_end: str
    value: str = ""
    kept_ends: tuple[str, ...] = ()
    is_on_lines: bool = False


QWEN3_CODER = CallTags(
    "<tool_call>", "</tool_call>", "<function=", (">",), "<parameter=", ">", "</parameter>", "</function>",
    is_on_lines=True,
)  # fmt: skip
MINIMAX = CallTags(
    "<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="', ('">',), '<parameter name="', '">',
    "</parameter>", "</invoke>",
)  # fmt: skip
DEEPSEEK_DSML = CallTags(
    "<｜DSML｜function_calls>", "</｜DSML｜function_calls>", '<｜DSML｜invoke name="', ('">',),
    '<｜DSML｜parameter name="', ">", "</｜DSML｜parameter>", "</｜DSML｜invoke>",
)  # fmt: skip
GLM = CallTags(
    "<tool_call>", "</tool_call>", "", ("\n", "<arg_key>", "</tool_call>"), "<arg_key>", "</arg_key>", "</arg_value>",
    "</tool_call>", value="<arg_value>", kept_ends=("<arg_key>", "</tool_call>"),
)  # fmt: skip


def tagged_calls(tags: CallTags) -> Callable[[Draft], Steps[None]]:
    """Make the parser of calls in `tags`."""
    # Qwen3-Coder leaves the outer tag out at times.
    starts = tuple(one for one in (tags.block, tags.call if tags.call else None) if one)

    def parse(draft: Draft) -> Steps[None]:
        reader = draft.reader
        while True:
            start = yield from reader.until(starts, draft.content.write)
            if start is None:
                return
            reader.mark()
            reader.take(len(start))
            is_named = start == tags.call or not tags.call
            if (is_named or (yield from reader.next_is(tags.call, skip_space=True))) and (
                yield from _call(draft, tags)
            ):
                yield from reader.next_is(tags.block_end, skip_space=True)
                draft.calls.settle()
            else:
                reader.back()
                draft.content.write(reader.take(len(start)))

    return parse


def _call(draft: Draft, tags: CallTags) -> Steps[bool]:
    """Take a call from its name on, and add it; False: it is none, and text is left taken."""
    reader, calls = draft.reader, draft.calls
    if not tags.call:
        yield from reader.skip()
    name, found = yield from reader.taken_until(tags.name_ends)
    name = name.strip()
    if found is None or not calls.knows(name):
        return False
    if found not in tags.kept_ends:
        reader.take(len(found))
    calls.begin(name)
    calls.write("{")
    if (yield from _values(draft, tags, name)):
        calls.write("}")
    calls.end()
    return True


def _values(draft: Draft, tags: CallTags, name: str) -> Steps[bool]:
    """Take keys and values until the call ends; returns whether it does."""
    reader, calls = draft.reader, draft.calls
    properties, before = calls.tools[name].properties, ""
    while True:
        found = yield from reader.next_is(tags.key, tags.call_end, skip_space=True)
        if found == tags.call_end or found is None:
            return found is not None
        head, found = yield from reader.taken_until((tags.key_end,))
        if found is None:
            return False
        reader.take(len(found))
        if tags.value and (yield from reader.next_is(tags.value, skip_space=True)) is None:
            return False
        key, _, kind = head.strip().partition('"')
        schema = properties.get(key, {"type": "string"} if 'string="true"' in kind else {})
        calls.write(f"{before}{as_json(key)}: ")
        before = ", "
        if is_text(schema):
            is_whole = yield from _text(draft, tags)
        else:
            is_whole = yield from _other(draft, tags, schema)
        if not is_whole:
            return False


def _text(draft: Draft, tags: CallTags) -> Steps[bool]:
    """Take a value that is text, as it comes; returns whether it ends."""
    calls = draft.calls
    lines = _Lines(calls) if tags.is_on_lines else None
    calls.write('"')
    found = yield from draft.reader.until(
        (tags.value_end,), lines.write if lines else lambda text: _quoted(calls, text)
    )
    if found is not None:
        draft.reader.take(len(found))
        calls.write('"')
    return found is not None


def _other(draft: Draft, tags: CallTags, schema: object) -> Steps[bool]:
    """Take a value that is JSON, or may be; returns whether it ends."""
    text, found = yield from draft.reader.taken_until((tags.value_end,))
    if found is None:
        return False
    draft.reader.take(len(found))
    if tags.is_on_lines:
        text = text.removeprefix("\n").removesuffix("\n")
    draft.calls.write(as_json(value_of(text, schema)))
    return True


def _quoted(calls: Calls, text: str) -> None:
    if text:
        calls.write(as_json(text)[1:-1])


class _Lines:
    """Writes a text without the newline that it begins with, and the one that it ends with."""

    def __init__(self, calls: Calls) -> None:
        self._calls, self._is_first, self._held = calls, True, ""

    def write(self, text: str) -> None:
        if not text:
            return
        if self._is_first:
            text, self._is_first = text.removeprefix("\n"), False
        text = self._held + text
        body = text.removesuffix("\n")
        self._held = text[len(body) :]
        _quoted(self._calls, body)
