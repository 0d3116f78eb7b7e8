"""gpt-oss's channels: analysis is reasoning, final and commentary are content, a message to a function is a call."""

import re

from foreroute.server.dialogue.parsing.draft import Draft
from foreroute.server.dialogue.parsing.json_text import take_json
from foreroute.server.dialogue.parsing.reader import Steps

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_LAST = ("<|end|>", "<|return|>", "<|call|>")
# A message may lack its end.
_ENDS = (*_LAST, _START, _CHANNEL)
MARKS = (*_ENDS, _MESSAGE, "<|constrain|>")
# With these, an answer is over; the model's own settings may lack them.
STOPS = ("<|call|>", "<|return|>")
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_NAME_OF_CHANNEL = re.compile(r"<\|channel\|>\s*([a-z]+)")
_CHANNELS = ("analysis", "commentary", "final")


def harmony(draft: Draft) -> Steps[None]:
    """Parse messages one after another."""
    reader = draft.reader
    while not reader.is_over or reader.text:
        reader.mark()
        first = yield from reader.next_is(_START, _CHANNEL, " to=", "to=")
        header, found = "", None
        if first is not None:
            header, found = yield from reader.taken_until((_MESSAGE, *_LAST))
        if found == _MESSAGE:
            reader.take(len(_MESSAGE))
            yield from _body(draft, f"{first}{header}")
        elif first in (_START, _CHANNEL) and found is None and _is_beginning(f"{first}{header}"):
            # Cut off before any text.
            return
        else:
            reader.back()
            draft.content.write(reader.take(len(first or "")))
            yield from reader.until(_ENDS, draft.content.write)
        yield from reader.next_is(*_LAST)
        draft.calls.settle()
        yield from reader.next_char()


def _body(draft: Draft, header: str) -> Steps[None]:
    """Take a message's text, up to its end."""
    recipient, channel = _RECIPIENT.search(header), _NAME_OF_CHANNEL.search(header)
    if recipient is not None:
        if not (yield from _call(draft, recipient[1].removeprefix("functions."))):
            draft.content.begin_next()
            draft.content.write(draft.reader.since_mark)
            yield from draft.reader.until(_ENDS, draft.content.write)
        return
    part = draft.reasoning if channel is not None and channel[1] == "analysis" else draft.content
    part.begin_next()
    yield from draft.reader.until(_ENDS, part.write)


def _call(draft: Draft, name: str) -> Steps[bool]:
    """Take a call's arguments and add it; False: it is none, and text is left taken."""
    reader, calls = draft.reader, draft.calls
    if not calls.knows(name):
        return False
    yield from reader.skip()
    following = yield from reader.next_char()
    if following == "{":
        calls.begin(name)
        yield from take_json(reader, calls.write)
        is_valid = calls.end()
        rest, _ = yield from reader.taken_until(_ENDS)
        if is_valid:
            draft.content.write(rest)
        return True
    if following == "<" and (yield from reader.next_is(*_LAST)) is not None:
        calls.whole(name, "{}")
        return True
    return False


def _is_beginning(header: str) -> bool:
    """Whether a text without <|message|> is the beginning of a message's header."""
    channel = header.partition(_CHANNEL)[2].strip()
    return any(one.startswith(channel.split()[0] if channel else "") for one in _CHANNELS)
