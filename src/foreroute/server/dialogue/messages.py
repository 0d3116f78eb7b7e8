"""A conversation, its tools and what is asked of the answer: plain data, the same for every API."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

ToolChoice = Literal["auto", "none", "required"]


@dataclass(frozen=True)
class ToolCall:
    """A call that an assistant made. arguments: JSON text, as the model wrote it; it may be no valid JSON."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class DialogueMessage:
    """One message.

    role: system, developer, user, assistant or tool. text: None: it had none. reasoning: what an assistant thought
    before it. calls: an assistant's. call_id: of a tool's message: the call that it answers. name: of a participant, or
    of the tool.
    """

    role: str
    text: str | None = None
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str | None = None
    name: str | None = None


def joined(messages: Sequence[DialogueMessage]) -> DialogueMessage:
    """Messages that follow each other as one, with the first one's role: texts on lines of their own, and all calls."""
    if len(messages) == 1:
        return messages[0]
    return replace(
        messages[0],
        text="\n".join(one.text for one in messages if one.text) or None,
        reasoning="\n".join(one.reasoning for one in messages if one.reasoning),
        calls=tuple(call for one in messages for call in one.calls),
    )


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. definition: name, description and parameters (a JSON schema), as given."""

    name: str
    definition: Mapping[str, Any]
    is_strict: bool = False

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schemas of its parameters, by name."""
        parameters = self.definition.get("parameters")
        found = parameters.get("properties") if isinstance(parameters, dict) else None
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Thinking:
    """What is asked of a model's reasoning; None leaves the template's own choice.

    is_on: whether it thinks first. effort: how much: none, minimal, low, medium, high or xhigh.
    """

    is_on: bool | None = None
    effort: str | None = None

    @property
    def wants_none(self) -> bool:
        """Whether the model is not to reason."""
        return self.is_on is False or (self.is_on is None and self.effort == "none")


@dataclass(frozen=True)
class Dialogue:
    """Messages, and what is asked of the next one.

    tools: those that may be called. choice: whether; or a tool's name, which must be called.
    one_call: at most one call in the answer. variables: further ones for the template.
    """

    messages: tuple[DialogueMessage, ...]
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice | Tool = "auto"
    one_call: bool = False
    thinking: Thinking = Thinking()
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call: `choice` is required or a tool."""
        return self.choice == "required" or isinstance(self.choice, Tool)

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that the answer may call."""
        if self.choice == "none":
            return ()
        return (self.choice,) if isinstance(self.choice, Tool) else self.tools
