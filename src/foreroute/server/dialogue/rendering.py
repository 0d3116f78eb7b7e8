"""A conversation as a chat template reads it: messages, tools and variables."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from foreroute.server.dialogue.described import with_folded_system
from foreroute.server.dialogue.messages import Dialogue, DialogueMessage, Thinking
from foreroute.server.dialogue.parsing.json_text import object_of
from foreroute.server.dialogue.reading import TemplateReading, content_for

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_SWITCHES = ("enable_thinking", "thinking")
# What templates are given by ourselves, and names that transformers' renderer has as its own.
_RESERVED = frozenset(
    {
        "messages", "tools", "documents", "conversations", "chat_template", "add_generation_prompt",
        "continue_final_message", "return_assistant_tokens_mask", "raise_exception", "strftime_now", "tojson", "range",
        "namespace", "loop",
    }
)  # fmt: skip
_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


class TemplateError(ValueError):
    """A conversation that the template cannot express. field: what of it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class TemplateInput:
    """What a template is given."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]


def template_input(dialogue: Dialogue, template: str, reading: TemplateReading) -> TemplateInput:
    """Make what `template` is given of a conversation, in the form that it reads.

    Raises:
        TemplateError: the template has no place for something that was asked for.
    """
    tools = dialogue.tools if dialogue.choice != "none" else ()
    has_calls = any(message.calls or message.role == "tool" for message in dialogue.messages)
    if tools and not reading.has_tools:
        raise TemplateError(
            "tools",
            "This model's chat template has no place for tools. Leave them out, or serve it with --tool-parser hermes.",
        )
    if has_calls and not reading.has_tools:
        raise TemplateError("messages", "This model's chat template has no place for tool calls and their answers.")
    names = {call.id: call.name for message in dialogue.messages for call in message.calls}
    writer = _Messages(template, reading, names)
    messages = dialogue.messages if reading.has_system else with_folded_system(dialogue.messages)
    return TemplateInput(
        [writer.message(message) for message in _one_call_each(messages, reading)],
        [{"type": "function", "function": dict(tool.definition)} for tool in tools] or None,
        {**thinking_variables(dialogue.thinking, reading), **_further(dialogue.variables, reading)},
    )


def _one_call_each(messages: Sequence[DialogueMessage], reading: TemplateReading) -> Sequence[DialogueMessage]:
    """The messages with one call each, followed by its answer, where the template shows no more of them."""
    if not reading.one_call:
        return messages
    found: list[DialogueMessage] = []
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        if len(message.calls) < 2:
            found.append(message)
            continue
        answers = []
        while at < len(messages) and messages[at].role == "tool":
            answers.append(messages[at])
            at += 1
        of_call: dict[str, list[DialogueMessage]] = {call.id: [] for call in message.calls}
        others: list[DialogueMessage] = []
        for answer in answers:
            of_call.get(answer.call_id or "", others).append(answer)
        for number, call in enumerate(message.calls):
            first = message if number == 0 else DialogueMessage(message.role, name=message.name)
            found.append(replace(first, calls=(call,)))
            # Of two calls with one id, the first has the answers.
            found += of_call.pop(call.id, [])
        found += others
    return found


class _Messages:
    """Writes messages for a template. names: of the functions that were called, by the calls' ids."""

    def __init__(self, template: str, reading: TemplateReading, names: Mapping[str, str]) -> None:
        self._reading, self._names = reading, names
        self._knows_developers = "developer" in template
        self._reasoning_fields = [field for field in _REASONING_FIELDS if field in template]
        # gpt-oss's refuses a message with calls that has both reasoning and content.
        self._one_text_beside_calls = "Cannot pass both content and thinking" in template

    def message(self, message: DialogueMessage) -> dict[str, Any]:
        """Write one."""
        role = "system" if message.role == "developer" and not self._knows_developers else message.role
        in_parts = ("tool",) if role == "tool" and self._reading.tool_in_parts else self._reading.in_parts
        text, reasoning = self._texts(message)
        written: dict[str, Any] = {"role": role, "content": content_for(role, text, in_parts)}
        name = message.name or self._names.get(message.call_id or "")
        if name:
            written["name"] = name
        if message.call_id:
            written["tool_call_id"] = self._id(message.call_id)
        if reasoning:
            written.update(dict.fromkeys(self._reasoning_fields, reasoning))
        if message.calls:
            written["tool_calls"] = [
                {
                    "id": self._id(call.id),
                    "type": "function",
                    "function": {"name": call.name, "arguments": self._arguments(call.arguments)},
                }
                for call in message.calls
            ]
            if not text and self._reading.empty_is_none:
                written["content"] = None
        return written

    def _texts(self, message: DialogueMessage) -> tuple[str, str]:
        """A message's text and its reasoning."""
        text, reasoning = message.text or "", message.reasoning
        if message.calls and self._one_text_beside_calls and text and reasoning:
            return "", f"{reasoning}\n\n{text}"
        return text, reasoning

    def _arguments(self, text: str) -> Any:
        """A call's arguments; what a model wrote wrongly is shown to it as it was, so that it can do better."""
        found = object_of(text) if text.strip() else {}
        if self._reading.text_arguments:
            return text if text.strip() else "{}"
        return {"arguments": text} if found is None else found

    def _id(self, call_id: str) -> str:
        if not self._reading.short_ids or _SHORT_ID.fullmatch(call_id):
            return call_id
        return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def thinking_variables(thinking: Thinking, reading: TemplateReading) -> dict[str, Any]:
    """The variables by which a template is told how much the model is to think, as far as it knows any."""
    effort = thinking.effort
    is_on = not thinking.wants_none if thinking != Thinking() else None
    found: dict[str, Any] = {}
    switches = [name for name in _SWITCHES if name in reading.names]
    if is_on is not None and switches:
        found[switches[0]] = is_on
    if effort not in (None, "none") and "reasoning_effort" in reading.names:
        found["reasoning_effort"] = _EFFORTS.get(str(effort), effort)
    return found


def _further(variables: Mapping[str, Any], reading: TemplateReading) -> dict[str, Any]:
    """The variables of chat_template_kwargs that the template reads.

    Raises:
        TemplateError: it does not read one of them, which would be without effect.
    """
    found = {}
    for name, value in variables.items():
        if not name.isidentifier() or name in _RESERVED or name.startswith("_") or name.endswith("_token"):
            raise TemplateError("chat_template_kwargs", f"{name!r} cannot be given to a chat template.")
        if name in reading.names:
            found[name] = value
        elif name not in _SWITCHES:
            raise TemplateError("chat_template_kwargs", f"This model's chat template does not read {name!r}.")
    return found
