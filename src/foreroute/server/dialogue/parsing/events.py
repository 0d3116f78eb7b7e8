"""What the parts of an answer are, in the order in which they arrive."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from foreroute.server.dialogue.messages import ToolCall


@dataclass(frozen=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text that the model wrote for itself."""

    text: str


@dataclass(frozen=True)
class CallBegan:
    """A tool is called; its arguments follow. index: 0 for the answer's first call."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the arguments of call `index`: together they are JSON text."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """The end of call `index`. is_valid: its arguments are an object. raw: an invalid call as the model wrote it."""

    index: int
    is_valid: bool
    raw: str


Event = Content | Reasoning | CallBegan | CallArguments | CallEnded


@dataclass
class ParsedAnswer:
    """An answer's parts so far, collected from its events.

    A call that proves to be invalid becomes content again, in its place: what is no valid call is text. Where
    `keeps_cut`, it is the call that was `cut` off by the end of the answer.
    """

    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    keeps_cut: bool = False
    cut: ToolCall | None = None
    _content: list[str] = field(default_factory=list)
    _begun: tuple[str, str] = ("", "")
    _arguments: list[str] = field(default_factory=list)

    @property
    def content(self) -> str:
        """The text for the reader."""
        return "".join(self._content)

    def add(self, events: Iterable[Event]) -> None:
        """Add the next events."""
        for event in events:
            if isinstance(event, Content):
                self._content.append(event.text)
            elif isinstance(event, Reasoning):
                self.reasoning += event.text
            elif isinstance(event, CallBegan):
                self._begun, self._arguments = (event.id, event.name), []
            elif isinstance(event, CallArguments):
                self._arguments.append(event.text)
            elif event.is_valid:
                self.calls.append(ToolCall(*self._begun, "".join(self._arguments)))
            elif self.keeps_cut:
                self.cut = ToolCall(*self._begun, "".join(self._arguments))
            else:
                self._content.append(event.raw)
