"""A chat's messages and tools on the wire, in the spellings of many servers, and as a conversation."""

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from foreroute.server.api.problems import not_possible, not_supported
from foreroute.server.api.strict import MOST_CALLS, MOST_PARTS, MOST_TOOLS, SHORT, Strict, at_most
from foreroute.server.dialogue.messages import DialogueMessage, Tool, ToolCall

# What servers put into messages and parts, and clients send back with the history: it is not for the model.
_NOTES = frozenset(
    {
        "id", "index", "object", "type", "status", "phase", "annotations", "cache_control",
        "provider_specific_fields", "reasoning_details", "reasoning_signature", "signature", "parsed", "logprobs",
        "finish_reason", "stop_reason", "created_at", "timestamp", "usage", "metadata", "extra_content",
        "thinking_signature", "citations",
    }
)  # fmt: skip
# What would be for the model, and is not supported: nothing may be in it.
_EMPTY = ("audio", "function_call", "images", "videos", "prefix", "partial", "tool_plan")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")
_PARTS = at_most(MOST_PARTS, "messages", "parts in a message")
Tools = Annotated[list[Any], at_most(MOST_TOOLS, "tools", "tools")]


class ContentPart(Strict):
    """A part of a message's content: text, or (type thinking) what an assistant thought."""

    type: Literal["text", "thinking"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kind = given.get("type")
        kept = {name: value for name, value in given.items() if name not in _NOTES}
        if kind in ("text", "input_text", "output_text"):
            return {**kept, "type": "text"}
        if kind == "refusal":
            return {"type": "text", "text": kept.get("refusal")}
        if kind == "redacted_thinking":
            return {"type": "thinking", "text": ""}
        if kind in ("thinking", "reasoning"):
            return {"type": "thinking", "text": _thought(kept)}
        if isinstance(kind, str):
            raise not_supported("messages", f"Content of type {kind[:40]!r} is not supported: text alone, no URLs.")
        return given


Parts = Annotated[list[ContentPart], SHORT, _PARTS]


class CalledFunction(Strict):
    """The function of a call in an assistant's message."""

    name: str
    arguments: str | dict[str, Any] | None = None


def _known(given: Any) -> Any:
    """What is known of a call's function: servers and clients add notes of their own (parsed_arguments)."""
    return {name: given[name] for name in ("name", "arguments") if name in given} if isinstance(given, dict) else given


class WireCall(Strict):
    """A call in an assistant's message."""

    id: str | None = None
    type: str | None = None
    function: Annotated[CalledFunction, BeforeValidator(_known)]

    @model_validator(mode="before")
    @classmethod
    def _functions(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if given.get("type", "function") not in ("function", None):
            raise not_supported("messages", "Calls in messages must be of the type function.")
        return {name: given[name] for name in ("id", "type", "function") if name in given}


class ChatMessage(Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts | None = None
    name: str | None = Field(None, max_length=512)
    tool_calls: Annotated[list[WireCall], SHORT, at_most(MOST_CALLS, "messages", "calls in a message")] | None = None
    tool_call_id: str | None = Field(None, max_length=512)
    # Four names of the same, by which servers answer and templates read.
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    thinking_blocks: Annotated[list[dict[str, Any]], SHORT, _PARTS] | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name in _EMPTY:
            if given.get(name) not in (None, [], {}, "", False):
                raise not_supported("messages", f"{name} in a message is not supported here. Leave it out.")
        if given.get("role") == "function":
            raise not_supported("messages", "Messages of the role function are not supported: use tools.")
        return {name: value for name, value in given.items() if name not in _NOTES and name not in _EMPTY}

    @property
    def text(self) -> str | None:
        """The whole content as text, its parts on lines of their own; None: there is none."""
        if self.content is None or isinstance(self.content, str):
            return self.refusal if self.content is None else self.content
        return "\n".join(part.text for part in self.content if part.type == "text")

    @property
    def thought(self) -> str:
        """What an assistant thought, by whichever name it came."""
        parts = self.content if isinstance(self.content, list) else []
        blocks = [_thought(block) for block in self.thinking_blocks or []]
        found = self.reasoning_content or self.reasoning or self.thinking
        return found or "\n".join([*blocks, *(part.text for part in parts if part.type == "thinking" and not blocks)])


def messages_of(given: Sequence[ChatMessage]) -> tuple[DialogueMessage, ...]:
    """The messages of a conversation. Calls without ids get some, and tools' answers without one take them in order.

    Raises:
        ApiError: a message has what only an assistant's can have.
    """
    found: list[DialogueMessage] = []
    unanswered: OrderedDict[str, None] = OrderedDict()
    for at, one in enumerate(given):
        if one.role != "assistant" and (one.tool_calls or one.thought):
            raise not_possible("messages", f"Message {at} is not an assistant's: it has no calls and no reasoning.")
        calls = _calls_of(one, at)
        call_id = one.tool_call_id or None
        if one.role == "tool":
            call_id = call_id or next(iter(unanswered), None)
            unanswered.pop(call_id or "", None)
        elif calls:
            unanswered = OrderedDict.fromkeys(call.id for call in calls)
        found.append(DialogueMessage(one.role, one.text, one.thought, calls, call_id, one.name or None))
    return tuple(found)


def _calls_of(given: ChatMessage, at: int) -> tuple[ToolCall, ...]:
    """The calls of message `at`."""
    return tuple(
        ToolCall(call.id or f"call_{at}_{number}", call.function.name, _arguments_text(call.function.arguments))
        for number, call in enumerate(given.tool_calls or [])
    )


def tools_of(given: Sequence[Any]) -> tuple[Tool, ...]:
    """The tools of a request.

    Raises:
        ApiError: one of them is no function, has no valid name or parameters, or has another one's name.
    """
    tools = tuple(_tool(one, f"tools.{at}") for at, one in enumerate(given))
    refuse_namesakes((tool, repr(tool.name)) for tool in tools)
    return tools


def refuse_namesakes(told: Iterable[tuple[Tool, str]]) -> None:
    """Check that no tools that differ have one name for the model: their calls could not be told apart.

    Args:
        told: each tool, and what the message calls it, in the request's words.
    Raises:
        ApiError: two have.
    """
    first: dict[str, tuple[Tool, str]] = {}
    for one in told:
        tool, said = one
        if first.setdefault(tool.name, one) != one:
            both = f"{first[tool.name][1]} and {said}"
            raise not_possible("tools", f"The tools {both} differ, and have one name for the model. Rename one.")


def _tool(given: Any, place: str) -> Tool:
    if not isinstance(given, dict):
        raise not_possible(place, f"{place} must be an object.")
    kind = given.get("type", "function")
    if kind != "function":
        raise not_supported(place, f"Tools of the type {str(kind)[:40]!r} are not supported here: functions alone.")
    function = given.get("function")
    if not isinstance(function, dict):
        raise not_possible(f"{place}.function", f"{place}.function must be an object.")
    return function_tool(function, f"{place}.function")


def function_tool(function: Mapping[str, Any], place: str) -> Tool:
    """The tool of a function: name, description, parameters and strict. place: of the function in the request.

    Raises:
        ApiError: it has no valid name, description or parameters.
    """
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise not_possible(f"{place}.name", f"{place}.name must be letters, digits, and any of _.:/-.")
    if parameters is not None and not isinstance(parameters, dict):
        raise not_possible(f"{place}.parameters", f"{place}.parameters must be a JSON schema.")
    if not isinstance(function.get("description", ""), (str, type(None))):
        raise not_possible(f"{place}.description", f"{place}.description must be text.")
    kept = {
        key: value for key, value in function.items() if key not in ("strict", "cache_control") and value is not None
    }
    # Templates take both for granted.
    completed = {
        "name": name,
        "description": "",
        **kept,
        "parameters": parameters or {"type": "object", "properties": {}},
    }
    return Tool(name, completed, function.get("strict") is True)


def _arguments_text(given: str | dict[str, Any] | None) -> str:
    return given or "{}" if isinstance(given, (str, type(None))) else json.dumps(given, ensure_ascii=False)


def _thought(given: dict[str, Any]) -> str:
    """The text of a block of thinking: text, or parts of text."""
    found = next((given[name] for name in ("thinking", "text", "reasoning") if given.get(name)), "")
    if isinstance(found, list):
        found = "".join(str(part.get("text", "")) for part in found if isinstance(part, dict))
    return found if isinstance(found, str) else ""
