"""Calls as a name and a JSON object between markers: DeepSeek's, Kimi's and Mistral's."""

from collections.abc import Callable
from dataclasses import dataclass

from foreroute.server.dialogue.parsing.draft import Draft
from foreroute.server.dialogue.parsing.json_calls import one_or_several
from foreroute.server.dialogue.parsing.json_text import take_json
from foreroute.server.dialogue.parsing.reader import Steps

_FENCES = ("```json", "```")


@dataclass(frozen=True)
class Marks:
    """The markers around calls: those of all of them, of each, and between a name and its arguments."""

    section: str
    call: str
    separator: str
    call_end: str
    section_end: str

    @property
    def all(self) -> tuple[str, ...]:
        """All of them."""
        return self.section, self.call, self.separator, self.call_end, self.section_end


DEEPSEEK = Marks(
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"
)
KIMI = Marks(
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
)
MISTRAL = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")


def marked_calls(marks: Marks) -> Callable[[Draft], Steps[None]]:
    """Make the parser of calls between `marks`."""

    def parse(draft: Draft) -> Steps[None]:
        reader = draft.reader
        while True:
            start = yield from reader.until((marks.section, marks.call), draft.content.write)
            if start is None:
                return
            reader.mark()
            reader.take(len(start))
            has_call = start == marks.call or (yield from reader.next_is(marks.call, skip_space=True)) is not None
            if has_call and (yield from _marked(draft, marks)):
                yield from reader.next_is("```", skip_space=True)
                yield from reader.next_is(marks.call_end, skip_space=True)
                yield from reader.next_is(marks.section_end, skip_space=True)
                draft.calls.settle()
            else:
                reader.back()
                draft.content.write(reader.take(len(start)))

    return parse


def _marked(draft: Draft, marks: Marks) -> Steps[bool]:
    reader = draft.reader
    head, found = yield from reader.taken_until((marks.separator, marks.call_end, marks.section_end))
    if found != marks.separator:
        return False
    reader.take(len(found))
    yield from reader.skip(" ")
    name, call_id = head.strip(), None
    if (yield from reader.next_char()) not in ("{", "", "\n", "<") and not draft.calls.knows(name):
        # DeepSeek-V3 and R1: the kind stands first ("function"), then the name on a line of its own.
        name, found = yield from reader.taken_until(("\n", marks.call_end))
        name = name.strip()
    elif not draft.calls.knows(name):
        # Kimi: functions.NAME:0, and templates want it back as the call's id.
        call_id, name = name, name.removeprefix("functions.").rpartition(":")[0]
    return (yield from _arguments(draft, name, call_id, (marks.call_end,)))


def _arguments(draft: Draft, name: str, call_id: str | None, ends: tuple[str, ...] = ()) -> Steps[bool]:
    """Take the arguments of a call and add it; False: it is none."""
    reader, calls = draft.reader, draft.calls
    if not calls.knows(name):
        return False
    yield from reader.next_is(*_FENCES, skip_space=True)
    yield from reader.skip()
    if (yield from reader.next_char()) == "{":
        calls.begin(name, call_id)
        yield from take_json(reader, calls.write)
        calls.end()
        return True
    if ends and (yield from reader.next_is(*ends)) is not None:
        calls.whole(name, "{}", call_id)
        return True
    return False


def mistral_calls(draft: Draft) -> Steps[None]:
    """Parse Mistral's calls: a list of JSON objects, or names and arguments, after [TOOL_CALLS]."""
    reader, start = draft.reader, MISTRAL[0]
    while (yield from reader.until((start,), draft.content.write)) is not None:
        reader.mark()
        reader.take(len(start))
        yield from reader.skip()
        is_json = (yield from reader.next_char()) in ("[", "{")
        if is_json:
            is_call = bool((yield from one_or_several(draft)))
        else:
            is_call = yield from _mistral_named(draft)
        draft.calls.settle()
        if not is_call:
            reader.back()
            draft.content.write(reader.take(len(start)))


def _mistral_named(draft: Draft) -> Steps[bool]:
    reader = draft.reader
    _, call_id_mark, arguments_mark = MISTRAL
    name, found = yield from reader.taken_until((call_id_mark, arguments_mark, "{"))
    call_id = None
    if found == call_id_mark:
        reader.take(len(found))
        call_id, found = yield from reader.taken_until((arguments_mark, "{"))
    if found == arguments_mark:
        reader.take(len(found))
    return found is not None and (yield from _arguments(draft, name.strip(), call_id and call_id.strip()))
