"""The fields of requests. Unknown fields, and those that would change the output, are refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from foreroute.server.api.chat_messages import ChatMessage, Tools, messages_of, tools_of
from foreroute.server.api.problems import not_possible, not_supported
from foreroute.server.api.strict import MOST_MESSAGES, SHORT, Strict, Whole, at_most, screened
from foreroute.server.dialogue.messages import Dialogue, Thinking, Tool, ToolChoice

# Accepted and ignored, as they change no answer: accounting, caching and routing hints of OpenAI's own service.
HARMLESS = frozenset(
    {
        "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier",
        "request_id", "priority",
    }
)  # fmt: skip
# Refused, as they change the output elsewhere, except as None or with these values, which ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "reasoning": (),
    "verbosity": (),
    "web_search_options": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_special_tokens": (),
    "typical_p": (1, 1.0),
    "mirostat": (0,),
    "logits_processors": (),
    "thinking": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}

Probability = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**64)]
# Above any vocabulary or context, so that numbers with thousands of digits are never computed with or printed.
TokenId = Annotated[Whole, Field(ge=0, lt=2**31)]


def _no_limit(given: Any) -> Any:
    # Two popular servers' way to say that there is none.
    return None if not isinstance(given, bool) and given == -1 else given


NumTokens = Annotated[Annotated[Whole, Field(ge=1, lt=2**31)] | None, BeforeValidator(_no_limit)]

Tokens = Annotated[list[TokenId], SHORT]
_MOST_BIASES = 2**14


def _few_biases(given: Any) -> Any:
    # The real limit is lower and checked later; this one bounds the time of validation.
    if isinstance(given, dict) and len(given) > _MOST_BIASES:
        raise not_possible("logit_bias", f"logit_bias has {len(given)} entries.")
    return given


class StreamOptions(Strict):
    """`stream_options`: a last chunk with the usage; obfuscation is accepted and has no effect."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Request(Strict):
    """Fields of both kinds of completion."""

    model: str | None = Field(None, max_length=512)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: Probability | None = None
    top_k: Whole | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    # Logits are divided by it: a smaller one would overflow float32.
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_few_biases)] = None
    seed: Seed | None = None
    n: Whole | None = Field(None, ge=1)
    stop: str | Annotated[list[str], SHORT] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Structured output, by all its names: server/api/structure.py.
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], SHORT] | None = None
    guided_grammar: str | None = None
    json_schema: dict[str, Any] | bool | str | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None
    # As in vLLM: the model's own end token does not end the answer, or not yet. For benchmarks with fixed lengths.
    ignore_eos: bool | None = None
    min_tokens: Whole | None = Field(None, ge=0, lt=2**31)

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, given: Any) -> Any:
        """Drop harmless fields, and refuse by name those that would be ignored."""
        if not isinstance(given, dict):
            return given
        refused = {name: values for name, values in REFUSED.items() if name not in cls.model_fields}
        return screened(given, HARMLESS, refused)

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "_Request":
        if self.stream_options is not None and not self.stream:
            raise not_possible("stream_options", "stream_options needs stream: true.")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, fail_fast=True), at_most(MOST_MESSAGES, "messages", "messages")
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class WireReasoning(Strict):
    """`reasoning`, as routers of several models have it."""

    effort: Effort | None = None
    enabled: bool | None = None
    summary: str | None = None


class WireThinking(Strict):
    """`thinking`, as several models' own services have it. What it may cost at most is a hint."""

    type: Literal["enabled", "disabled", "adaptive", "auto"]
    budget_tokens: Whole | None = None
    clear_thinking: bool | None = None


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: NumTokens = None
    max_completion_tokens: NumTokens = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    reasoning: WireReasoning | None = None
    enable_thinking: bool | None = None
    thinking: WireThinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise not_possible("top_logprobs", "top_logprobs needs logprobs: true.")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise not_possible("max_tokens", "max_tokens and max_completion_tokens differ. Give one of them.")
        return self

    @property
    def most_new(self) -> int | None:
        """Most tokens to generate; None: as many as the context holds."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def dialogue(self) -> Dialogue:
        """What is asked for, in no API's wire format.

        Raises:
            ApiError: messages or tools are not valid, or a tool is chosen that is not there.
        """
        tools = tools_of(self.tools or [])
        return Dialogue(
            messages_of(self.messages),
            tools,
            tool_choice_of(self.tool_choice, tools),
            one_call=self.parallel_tool_calls is False,
            thinking=self._asked_thinking(),
            variables=self.chat_template_kwargs or {},
        )

    def _asked_thinking(self) -> Thinking:
        effort = self.reasoning_effort or (self.reasoning.effort if self.reasoning is not None else None)
        is_on = self.enable_thinking
        if is_on is None and self.reasoning is not None:
            is_on = self.reasoning.enabled
        if is_on is None and self.thinking is not None:
            is_on = {"enabled": True, "disabled": False}.get(self.thinking.type)
        return Thinking(is_on, effort)


def tool_choice_of(given: Any, tools: tuple[Tool, ...]) -> ToolChoice | Tool:
    """The choice of tools that a request names, in several servers' spellings.

    Raises:
        ApiError: it is none, or names a tool that is not there.
    """
    if isinstance(given, dict):
        kind = given.get("type")
        if kind == "function":
            function = given.get("function") if isinstance(given.get("function"), dict) else given
            name = function.get("name") if isinstance(function, dict) else None
            found = next((tool for tool in tools if tool.name == name), None)
            if found is None:
                raise not_possible("tool_choice", f"tool_choice names {str(name)[:80]!r}, which is not in tools.")
            return found
        given = kind if kind in ("none", "auto", "any", "required") else "?"
    names: dict[Any, ToolChoice] = {None: "auto", "auto": "auto", "none": "none", "required": "required"}
    is_name = given is None or isinstance(given, str)
    choice = names.get("required" if given == "any" else given) if is_name else None
    if choice is None:
        raise not_possible("tool_choice", "tool_choice is none, auto, required, or names a function.")
    if choice == "required" and not tools:
        raise not_possible("tool_choice", "tool_choice required needs tools.")
    return choice


class CompletionRequest(_Request):
    """POST /v1/completions: a prompt, or several, as text or as token ids."""

    prompt: str | Annotated[list[str], SHORT] | Tokens | Annotated[list[Tokens], SHORT]
    max_tokens: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = None
    logprobs: Whole | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: Whole | None = Field(None, ge=1)

    @property
    def most_new(self) -> int | None:
        """Most tokens to generate; None: the default of a completion, or with max_tokens -1 what the context holds."""
        return None if self.max_tokens == -1 else self.max_tokens

    @model_validator(mode="after")
    def _agree(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise not_possible("max_tokens", "max_tokens 0 generates nothing: it needs echo: true.")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise not_supported("best_of", "best_of is not supported: ask for n answers, and choose.")
        return self


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or messages put into the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise not_possible("prompt", "Give either prompt or messages.")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Tokens
