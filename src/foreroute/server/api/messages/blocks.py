"""A conversation in Anthropic's content blocks, and as plain messages."""

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import model_validator

from foreroute.server.api.problems import not_possible, not_supported
from foreroute.server.api.strict import MOST_PARTS, SHORT, Strict, at_most
from foreroute.server.dialogue.messages import DialogueMessage, ToolCall, joined

# What blocks have beside their content: hints, and notes of the service.
_NOTES = frozenset({"cache_control", "citations", "signature", "caller"})
_BLOCKS = at_most(MOST_PARTS, "messages", "blocks in a message")


def _without_notes(given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    # Clients write out the fields that a block lacks.
    return {name: one for name, one in given.items() if name not in _NOTES and one is not None}


class WireText(Strict):
    """A block of text."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, given: Any) -> Any:
        return _without_notes(given)


class WireBlock(Strict):
    """A block of any type that is supported."""

    type: Literal["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]
    text: str | None = None
    thinking: str | None = None
    data: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | Annotated[list[WireText], SHORT, _BLOCKS] | None = None
    is_error: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kind = given.get("type")
        if isinstance(kind, str) and kind not in _FIELDS:
            raise not_supported("messages", f"Content of type {kind[:40]!r} is not supported: text and tools alone.")
        inner = given.get("content")
        others = [one.get("type") for one in inner if isinstance(one, dict)] if isinstance(inner, list) else []
        for other in others:
            if other != "text":
                raise not_supported("messages", f"Results of type {str(other)[:40]!r} are not supported: text alone.")
        return _without_notes(given)

    @model_validator(mode="after")
    def _is_whole(self) -> "WireBlock":
        missing = [name for name in _FIELDS[self.type] if getattr(self, name) is None]
        if missing:
            raise not_possible("messages", f"A block of type {self.type} has no {missing[0]}.")
        return self

    @property
    def result(self) -> str:
        """What a tool answered."""
        if isinstance(self.content, list):
            return "\n".join(one.text for one in self.content)
        return self.content or ("The tool failed." if self.is_error else "")


# What each type must have.
_FIELDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}


class WireMessage(Strict):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[WireBlock], SHORT, _BLOCKS]

    @property
    def blocks(self) -> Sequence[WireBlock]:
        """Its blocks; a text is one."""
        return [WireBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content


def conversation(system: str, given: Sequence[WireMessage]) -> tuple[DialogueMessage, ...]:
    """The messages of a conversation. Those of one role that follow each other are one, as Anthropic says.

    Raises:
        ApiError: a message has blocks that its role cannot have.
    """
    found = [[DialogueMessage("system", system)]] if system else []
    for at, one in enumerate(given):
        for message in [_of_assistant(one, at)] if one.role == "assistant" else _of_others(one, at):
            if found and found[-1][0].role == message.role != "tool":
                found[-1].append(message)
            else:
                found.append([message])
    return tuple(map(joined, found))


def _of_others(given: WireMessage, at: int) -> Iterator[DialogueMessage]:
    """A user's or system's message: its texts, and of a user's the answers of tools."""
    for block in given.blocks:
        if block.type == "tool_result" and given.role == "user":
            yield DialogueMessage("tool", block.result, call_id=block.tool_use_id)
        elif block.type == "text":
            yield DialogueMessage(given.role, block.text)
        else:
            raise not_possible("messages", f"Message {at} is a {given.role}'s: it has no {block.type}.")
    if not given.blocks:
        yield DialogueMessage(given.role, "")


def _of_assistant(given: WireMessage, at: int) -> DialogueMessage:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for block in given.blocks:
        if block.type == "tool_result":
            raise not_possible("messages", f"Message {at} is an assistant's: it has no tool_result.")
        if block.type == "tool_use":
            calls.append(ToolCall(block.id or "", block.name or "", json.dumps(block.input, ensure_ascii=False)))
        texts += [block.text] if block.text else []
        thoughts += [block.thinking] if block.thinking else []
    return DialogueMessage("assistant", "\n".join(texts) or None, "\n".join(thoughts), tuple(calls))
