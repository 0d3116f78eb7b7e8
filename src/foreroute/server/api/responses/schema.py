"""The fields of POST /v1/responses. Unknown ones, and those that would change the output, are refused by name."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from foreroute.server.api.chat_messages import Tools
from foreroute.server.api.problems import not_possible, not_supported
from foreroute.server.api.responses.items import WireItem, conversation
from foreroute.server.api.responses.tools import NamedTool, chosen_name, named_tools
from foreroute.server.api.schema import NumTokens, Probability, WireReasoning, tool_choice_of
from foreroute.server.api.strict import MOST_MESSAGES, SHORT, Strict, at_most, screened
from foreroute.server.dialogue.messages import Dialogue, Thinking, Tool
from foreroute.server.dialogue.parsing.json_text import as_json

# Accepted and ignored, as they change no answer.
_HARMLESS = frozenset(
    {
        "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
        "service_tier", "client_metadata", "max_tool_calls", "stream_options", "background_options", "request_id",
        "priority",
    }
)  # fmt: skip
# Refused unless they ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "previous_response_id": (), "conversation": (), "store": (False,), "background": (False,), "prompt": (),
    "truncation": ("disabled",), "context_management": ([],), "top_logprobs": (0,), "moderation": (),
}  # fmt: skip
_WHY = {
    "previous_response_id": "nothing is stored. Send the whole conversation as input",
    "conversation": "nothing is stored. Send the whole conversation as input",
    "store": "nothing is stored. Give false, or leave it out",
}
# What `include` may ask for: it is there anyway, or is none here.
_INCLUDABLE = frozenset({"reasoning.encrypted_content"})
# Reasoning, texts and calls of one message are items of their own.
_MOST_ITEMS = 4 * MOST_MESSAGES


class _Reasoning(WireReasoning):
    """How much the model reasons; its reasoning comes whole, and never as a summary."""

    generate_summary: str | None = None


class ResponsesRequest(Strict):
    """POST /v1/responses."""

    model: str | None = Field(None, max_length=512)
    input: str | Annotated[list[WireItem], Field(min_length=1, fail_fast=True), at_most(_MOST_ITEMS, "input", "items")]
    instructions: str | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: _Reasoning | None = None
    max_output_tokens: NumTokens = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: Probability | None = None
    stream: bool | None = None
    include: Annotated[list[str], SHORT] | None = None
    metadata: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, given: Any) -> Any:
        """Drop harmless fields, and refuse by name those that would be ignored."""
        if not isinstance(given, dict):
            return given
        return screened(given, _HARMLESS, _REFUSED, _WHY)

    @model_validator(mode="after")
    def _includes_nothing(self) -> "ResponsesRequest":
        for one in self.include or []:
            if one not in _INCLUDABLE:
                raise not_supported("include", f"include {one[:80]!r} is not supported here.")
        for name, value in (self.text or {}).items():
            if name not in ("format", "verbosity") or (name == "verbosity" and value not in (None, "medium")):
                raise not_supported("text", f"text.{name[:40]} is not supported here. Leave it out.")
        return self

    @model_validator(mode="after")
    def _can_be_told_again(self) -> "ResponsesRequest":
        # An answer repeats these. 1e999 is read as infinity, which JSON cannot say.
        for name in ("metadata", "tools"):
            try:
                as_json(getattr(self, name))
            except ValueError:
                raise not_possible(name, f"{name} has a number that is not finite.") from None
        return self

    def told_tools(self) -> dict[str, NamedTool]:
        """The tools that the model is told of, by the names by which it knows them.

        Raises:
            ApiError: a tool is not valid.
        """
        return {one.tool.name: one for one in named_tools(self.tools or [])}

    @property
    def format_asked(self) -> tuple[str, Any] | None:
        """The field that asks for JSON, and its schema; None: answers are free text.

        Raises:
            ApiError: it asks for something else.
        """
        given = (self.text or {}).get("format")
        kind = given.get("type") if isinstance(given, dict) else None
        if given is None or kind == "text":
            return None
        if kind == "json_object":
            return "text.format", {"type": "object"}
        if kind != "json_schema" or not isinstance(given.get("schema"), dict):
            raise not_possible("text.format", "text.format must be of the type text, json_object, or json_schema.")
        return "text.format.schema", given["schema"]

    def dialogue(self) -> Dialogue:
        """What is asked for, in no API's wire format.

        Raises:
            ApiError: the input or tools are not valid, or a tool is chosen that is not there.
        """
        tools = tuple(one.tool for one in named_tools(self.tools or []))
        choice = self.tool_choice
        if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
            tools, choice = _allowed(choice, tools), choice.get("mode")
        if isinstance(choice, dict) and choice.get("type") in ("function", "custom"):
            function = choice.get("function")  # as chat completions nest it
            named = function if isinstance(function, dict) else choice
            choice = {"type": "function", "name": chosen_name(named)}
        items = [WireItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        asked = self.reasoning or _Reasoning()
        return Dialogue(
            conversation(self.instructions or "", items),
            tools,
            tool_choice_of(choice, tools),
            one_call=self.parallel_tool_calls is False,
            thinking=Thinking(asked.enabled, asked.effort),
        )


def _allowed(given: dict[str, Any], tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
    listed = given.get("tools")
    named = {chosen_name(one) for one in listed if isinstance(one, dict)} if isinstance(listed, list) else set()
    found = tuple(tool for tool in tools if tool.name in named)
    if not found or not named <= {tool.name for tool in found}:
        raise not_possible("tool_choice", "tool_choice allows tools that are not in tools.")
    return found
