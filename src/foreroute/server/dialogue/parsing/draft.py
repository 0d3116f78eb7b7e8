"""What a format's parser writes to: content, reasoning, and calls, with the white space around them removed."""

import secrets
from collections.abc import Callable, Mapping

from foreroute.server.dialogue.messages import Tool
from foreroute.server.dialogue.parsing.events import (
    CallArguments,
    CallBegan,
    CallEnded,
    Content,
    Event,
    Reasoning,
)
from foreroute.server.dialogue.parsing.json_text import object_of
from foreroute.server.dialogue.parsing.reader import TextReader

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def long_id() -> str:
    """A call's id as OpenAI's are."""
    return f"call_{secrets.token_hex(12)}"


def short_id() -> str:
    """A call's id of nine letters and digits, as Mistral's templates want them."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


class Channel:
    """Text of one kind. Once it is cut, the space around the cut is not passed on.

    Args:
        emit: called with each piece of it. holds: space is held back until more text follows, as a cut may follow.
    """

    def __init__(self, emit: Callable[[str], None], *, holds: bool) -> None:
        self._emit, self._holds = emit, holds
        self._held, self._is_after_cut = "", False
        self.is_empty = True

    def write(self, text: str) -> None:
        """Add text."""
        text = self._held + text
        if self._is_after_cut:
            text = text.lstrip("\n")
        body = text.rstrip() if self._holds or self._is_after_cut else text
        self._held = text[len(body) :]
        if body:
            self._is_after_cut, self.is_empty = False, False
            self._emit(body)

    def cut(self) -> str:
        """Something else stands here; returns the space before it, which is not passed on."""
        held, self._held, self._is_after_cut = self._held, "", True
        return held

    def mend(self) -> None:
        """What was cut out is text after all, and what follows is not to be trimmed."""
        self._is_after_cut = False

    def begin_next(self) -> None:
        """A further text of this kind follows, set apart from what was written before."""
        self.cut()
        if not self.is_empty:
            self._emit("\n\n")
            self._held, self._is_after_cut = "", True

    def end(self) -> None:
        """The answer is over."""
        if self._held and not self._is_after_cut:
            self._emit(self._held)
        self._held = ""


class Calls:
    """Calls of known tools.

    Args:
        tools: those that may be called, by name. reader: its mark is where a call began.
        content: is cut where a call begins. emit: called with events. new_id: makes a call's id.

    Attributes:
        tools: as above. is_broken: the last call is invalid, and has not been settled.
    """

    def __init__(
        self,
        tools: Mapping[str, Tool],
        reader: TextReader,
        content: Channel,
        emit: Callable[[Event], None],
        new_id: Callable[[], str],
    ) -> None:
        self.tools = tools
        self._reader, self._content, self._emit, self._new_id = reader, content, emit, new_id
        self._arguments: list[str] = []
        self._num_begun, self._space_before = 0, ""
        self.is_broken = False

    def knows(self, name: str) -> bool:
        """Whether there is such a tool."""
        return name in self.tools

    def begin(self, name: str, call_id: str | None = None) -> None:
        """Begin a call of a tool that is known."""
        self._space_before = self._content.cut()
        self._arguments = []
        self._emit(CallBegan(self._num_begun, call_id or self._new_id(), name))
        self._num_begun += 1

    def write(self, text: str) -> None:
        """Add to the arguments of the call."""
        self._arguments.append(text)
        self._emit(CallArguments(self._num_begun - 1, text))

    def end(self) -> bool:
        """End the arguments of the call; returns whether they are valid. If not, `settle` ends the call."""
        self.is_broken = object_of("".join(self._arguments)) is None
        if not self.is_broken:
            self._emit(CallEnded(self._num_begun - 1, True, ""))
        return not self.is_broken

    def settle(self) -> None:
        """End an invalid call, all of which has been taken since the reader's mark."""
        if self.is_broken:
            self.is_broken = False
            self._content.mend()
            self._emit(CallEnded(self._num_begun - 1, False, self._space_before + self._reader.since_mark))

    def whole(self, name: str, arguments: str, call_id: str | None = None) -> None:
        """Add a call whose arguments are known."""
        self.begin(name, call_id)
        self.write(arguments)
        self.end()


class Draft:
    """The text that arrives, and what a parser makes of it.

    Attributes:
        reader: the text. content, reasoning, calls: see there. events: those that have not been collected.
    """

    def __init__(self, tools: Mapping[str, Tool], new_id: Callable[[], str]) -> None:
        self.events: list[Event] = []
        self.reader = TextReader()
        self.content = Channel(lambda text: self.events.append(Content(text)), holds=bool(tools))
        self.reasoning = Channel(lambda text: self.events.append(Reasoning(text)), holds=True)
        self.calls = Calls(tools, self.reader, self.content, self.events.append, new_id)
