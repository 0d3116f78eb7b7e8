"""The items of an input, and as a conversation."""

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import model_validator

from foreroute.server.api.chat_messages import Parts
from foreroute.server.api.problems import not_possible, not_supported
from foreroute.server.api.responses.tools import known_name
from foreroute.server.api.strict import Strict
from foreroute.server.dialogue.messages import DialogueMessage, ToolCall, joined

# What the items of an answer have beside their content.
_NOTES = frozenset({"id", "status", "phase", "caller", "created_by", "encrypted_content", "async"})
# What each type must have.
_FIELDS: dict[str, tuple[str, ...]] = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "custom_tool_call": ("call_id", "name", "input"),
    "custom_tool_call_output": ("call_id", "output"),
    "reasoning": (),
}
_Text = str | Parts


class WireItem(Strict):
    """An item of any type that is supported; without a type it is a message."""

    type: Literal[
        "message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output", "reasoning"
    ] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: _Text | None = None
    name: str | None = None
    namespace: str | None = None
    call_id: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: _Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kind = given.get("type")
        if kind == "item_reference":
            how = "Send whole items: clients do with `store: false` in their settings."
            raise not_supported("input", f"item_reference is not supported here: nothing is stored. {how}")
        if isinstance(kind, str) and kind not in _FIELDS:
            raise not_supported("input", f"Items of the type {kind[:40]!r} are not supported here.")
        kept = {name: one for name, one in given.items() if name not in _NOTES and one is not None}
        if kind == "reasoning":
            return {"type": kind, "content": _thought(kept.pop("content", None)) or _thought(kept.get("summary"))}
        return kept if kind is not None else {name: one for name, one in kept.items() if name != "type"}

    @model_validator(mode="after")
    def _is_whole(self) -> "WireItem":
        missing = [name for name in _FIELDS[self.type] if getattr(self, name) is None]
        if missing:
            raise not_possible("input", f"An item of the type {self.type} has no {missing[0]}.")
        return self

    def message(self) -> DialogueMessage:
        """The item as a message of its own.

        Raises:
            ApiError: it has what only an assistant's can have.
        """
        if self.type == "reasoning":
            return DialogueMessage("assistant", reasoning=_text(self.content))
        if self.type == "message":
            return DialogueMessage(self.role or "user", _text(self.content), self._thought(self.content))
        if self.type in ("function_call_output", "custom_tool_call_output"):
            return DialogueMessage("tool", _text(self.output), self._thought(self.output), call_id=self.call_id)
        # A custom tool is a function of one text here.
        arguments = self.arguments if self.type == "function_call" else json.dumps({"input": self.input})
        name = known_name(self.namespace, self.name or "")
        return DialogueMessage("assistant", calls=(ToolCall(self.call_id or "", name, arguments or "{}"),))

    def _thought(self, content: _Text | None) -> str:
        found = _text(content, "thinking") if isinstance(content, list) else ""
        if found and self.role != "assistant":
            raise not_possible("input", "An item that is not an assistant's message has no reasoning in its content.")
        return found


def conversation(instructions: str, given: Sequence[WireItem]) -> tuple[DialogueMessage, ...]:
    """The messages of a conversation. Items that an assistant made one after another are one message.

    Many templates know one system's message, at the beginning: the instructions, and those of the input's beginning.

    Raises:
        ApiError: see `WireItem.message`.
    """
    found = [[DialogueMessage("system", instructions)]] if instructions else []
    for item in given:
        message = item.message()
        last = found[-1][0] if found else None
        is_more = last is not None and last.role == message.role == "assistant"
        if last is not None and message.role in ("system", "developer") and len(found) == 1:
            is_more = last.role in ("system", "developer")
        if is_more:
            found[-1].append(message)
        else:
            found.append([message])
    return tuple(map(joined, found))


def _text(given: _Text | None, kind: str = "text") -> str:
    """A text, or the texts of the parts of this kind."""
    return given if isinstance(given, str) else "\n".join(part.text for part in given or [] if part.type == kind)


def _thought(parts: Any) -> str:
    """The text of the parts of reasoning, or of its summary."""
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return "\n".join(text for text in texts if isinstance(text, str))
