"""The fields of POST /v1/messages. Unknown ones, and those that would change the output, are refused by name."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from foreroute.server.api.chat_messages import Tools, function_tool, refuse_namesakes
from foreroute.server.api.messages.blocks import WireMessage, WireText, conversation
from foreroute.server.api.problems import ApiError, not_possible, not_supported
from foreroute.server.api.schema import Probability
from foreroute.server.api.strict import MOST_MESSAGES, MOST_PARTS, SHORT, Strict, Whole, at_most, screened
from foreroute.server.dialogue.messages import Dialogue, Thinking, Tool, ToolChoice

# Accepted and ignored, as they change no answer: hints for caches, accounting and routing.
_HARMLESS = frozenset(
    {
        "metadata", "service_tier", "cache_control", "inference_geo", "betas", "billing_policy", "diagnostics",
        "fallback_credit_token", "user_profile_id", "workspace_id",
    }
)  # fmt: skip
# Refused unless they ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "container": (), "mcp_servers": ([],), "speed": ("standard",), "fallbacks": ([],), "prefill": (False,),
    "compaction": (),
}  # fmt: skip
_TOOL_HINTS = frozenset({"cache_control", "eager_input_streaming"})
_TOOL_REFUSED: dict[str, tuple[Any, ...]] = {
    "defer_loading": (False,),
    "allowed_callers": (["direct"], []),
    "input_examples": ([],),
}


class _Thinking(Strict):
    """Whether the model reasons first. What it may cost at most is a hint."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Whole | None = None
    display: Literal["summarized", "omitted"] | None = None


class _Choice(Strict):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _OutputConfig(Strict):
    """How much the model reasons, and what the answer looks like."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class CountRequest(Strict):
    """POST /v1/messages/count_tokens."""

    model: str | None = Field(None, max_length=512)
    messages: Annotated[
        list[WireMessage], Field(min_length=1, fail_fast=True), at_most(MOST_MESSAGES, "messages", "messages")
    ]
    system: str | Annotated[list[WireText], SHORT, at_most(MOST_PARTS, "system", "blocks in system")] | None = None
    tools: Tools | None = None
    tool_choice: _Choice | None = None
    thinking: _Thinking | None = None
    output_config: _OutputConfig | None = None
    # An older name of output_config.format.
    output_format: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, given: Any) -> Any:
        """Drop harmless fields, and refuse by name those that would be ignored."""
        if not isinstance(given, dict):
            return given
        if given.get("thread") is not None:
            # By this code Anthropic's client knows that it is to send whole conversations.
            why = "thread is not supported here: nothing is kept. Send the whole conversation."
            raise ApiError(400, why, param="thread", code="thread_unsupported_request")
        return screened(given, {*_HARMLESS, "thread"}, _REFUSED)

    @model_validator(mode="after")
    def _keeps_the_context(self) -> "CountRequest":
        edits = (self.context_management or {}).get("edits") or []
        if not isinstance(edits, list) or any(not isinstance(one, dict) or one.get("keep") != "all" for one in edits):
            raise not_supported("context_management", "context_management is not supported here: nothing is cleared.")
        return self

    def dialogue(self) -> Dialogue:
        """What is asked for, in no API's wire format.

        Raises:
            ApiError: messages or tools are not valid, or a tool is chosen that is not there.
        """
        tools = tuple(_tool(one, f"tools.{at}") for at, one in enumerate(self.tools or []))
        refuse_namesakes((tool, repr(tool.name)) for tool in tools)
        system = self.system if isinstance(self.system, str) else "\n".join(one.text for one in self.system or [])
        is_on = {"enabled": True, "disabled": False}.get(self.thinking.type) if self.thinking is not None else None
        return Dialogue(
            conversation(system, self.messages),
            tools,
            _chosen(self.tool_choice, tools),
            one_call=self.tool_choice is not None and self.tool_choice.disable_parallel_tool_use is True,
            thinking=Thinking(is_on, self.output_config.effort if self.output_config is not None else None),
        )


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[Whole, Field(ge=1, lt=2**31)]
    stop_sequences: Annotated[list[str], SHORT] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: Probability | None = None
    top_k: Whole | None = Field(None, ge=0, lt=2**31)

    @property
    def format_asked(self) -> tuple[str, dict[str, Any]] | None:
        """The field that asks for JSON, and its schema; None: answers are free text.

        Raises:
            ApiError: it asks for something else.
        """
        name, given = "output_format", self.output_format
        if self.output_config is not None and self.output_config.format is not None:
            name, given = "output_config.format", self.output_config.format
        if given is None:
            return None
        if given.get("type") != "json_schema" or not isinstance(given.get("schema"), dict):
            raise not_possible(name, f"{name} must have the type json_schema, and a schema.")
        return f"{name}.schema", given["schema"]


def _tool(given: Any, place: str) -> Tool:
    if not isinstance(given, dict):
        raise not_possible(place, f"{place} must be an object.")
    if given.get("type") not in (None, "custom"):
        kind = str(given["type"])[:40]
        raise not_supported(place, f"Tools of the type {kind!r} are not supported here: those with an input_schema.")
    given = screened(given, _TOOL_HINTS, _TOOL_REFUSED, place=f"{place}.")
    schema = given.get("input_schema")
    if not isinstance(schema, dict):
        raise not_possible(f"{place}.input_schema", f"{place}.input_schema must be a JSON schema.")
    known = ("name", "description", "strict")
    others = given.keys() - {*known, "type", "input_schema"}
    if others:
        name = f"{place}.{min(others)[:40]}"
        raise not_supported(name, f"There is no field {name!r}. Leave it out.")
    return function_tool({**{name: given[name] for name in known if name in given}, "parameters": schema}, place)


def _chosen(given: _Choice | None, tools: tuple[Tool, ...]) -> ToolChoice | Tool:
    if given is None:
        return "auto"
    if given.type == "tool":
        found = next((tool for tool in tools if tool.name == given.name), None)
        if found is None:
            raise not_possible("tool_choice", f"tool_choice names {str(given.name)[:80]!r}, which is not in tools.")
        return found
    if given.type == "any" and not tools:
        raise not_possible("tool_choice", "tool_choice any needs tools.")
    choices: dict[str, ToolChoice] = {"any": "required", "none": "none"}
    return choices.get(given.type, "auto")
