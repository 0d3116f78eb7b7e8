"""The fields of requests. Unknown fields, and those that would change the output, are refused by name."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from foreroute.server.api.problems import not_possible, not_supported

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
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_special_tokens": (),
    "typical_p": (1, 1.0),
    "mirostat": (0,),
    "grammar": (),
    "logits_processors": (),
    "thinking": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}

Probability = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
# Above any vocabulary or context, so that numbers with thousands of digits are never computed with or printed.
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
NumTokens = Annotated[int, Field(ge=1, lt=2**31)]


# Validation of a list stops at its first wrong element: reporting a million would take seconds and gigabytes.
_SHORT = Field(fail_fast=True)
Tokens = Annotated[list[TokenId], _SHORT]
_MOST_BIASES = 2**14


def _few_biases(given: Any) -> Any:
    # The real limit is lower and checked later; this one bounds the time of validation.
    if isinstance(given, dict) and len(given) > _MOST_BIASES:
        raise not_possible("logit_bias", f"logit_bias has {len(given)} entries.")
    return given


class _Strict(BaseModel):
    """Accepts only JSON's own types, without conversion ("5" is no number), and no further fields."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, given: Any) -> Any:
        """Keep only the first unknown field: the answer names just that one, and there may be a million."""
        if not isinstance(given, dict) or len(given) <= len(cls.model_fields):
            return given
        kept = {name: value for name, value in given.items() if name in cls.model_fields}
        first = next((name for name in given if name not in cls.model_fields), None)
        return kept if first is None else {**kept, first: given[first]}


class StreamOptions(_Strict):
    """`stream_options`: a last chunk with the usage; obfuscation is accepted and has no effect."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(_Strict):
    """`response_format`: only text is supported."""

    type: Literal["text"]

    @model_validator(mode="before")
    @classmethod
    def _name_the_others(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if kind in ("json_object", "json_schema"):
            raise not_supported("response_format", f"response_format {kind} is not supported: answers are free text.")
        return given


class _Request(_Strict):
    """Fields of both kinds of completion."""

    model: str | None = Field(None, max_length=512)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: Probability | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    # Logits are divided by it: a smaller one would overflow float32.
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_few_biases)] = None
    seed: Seed | None = None
    n: int | None = Field(None, ge=1)
    stop: str | Annotated[list[str], _SHORT] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # As in vLLM: the model's own end token does not end the answer, or not yet. For benchmarks with fixed lengths.
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, lt=2**31)

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, given: Any) -> Any:
        """Drop harmless fields, and refuse by name those that would be ignored."""
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if name in HARMLESS:
                continue
            if name in REFUSED and name not in cls.model_fields:
                if value is not None and not any(value is one or value == one for one in REFUSED[name]):
                    raise not_supported(name, f"{name} is not supported here. Leave it out.")
                continue
            kept[name] = value
        return kept

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "_Request":
        if self.stream_options is not None and not self.stream:
            raise not_possible("stream_options", "stream_options needs stream: true.")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _name_the_others(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise not_supported("messages", f"Content of type {kind[:40]!r} is not supported: text alone, no URLs.")
        return given


class ChatMessage(_Strict):
    """One message of a conversation."""

    # Fields that clients send back, empty, with an assistant's message.
    EMPTY: ClassVar = ("refusal", "audio", "annotations", "function_call", "tool_calls", "reasoning_content", "name")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], _SHORT] | None = None

    @model_validator(mode="before")
    @classmethod
    def _screen(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name in cls.EMPTY:
            if given.get(name) not in (None, [], {}, ""):
                raise not_supported("messages", f"{name} in a message is not supported here. Leave it out.")
        if given.get("role") in ("tool", "function"):
            raise not_supported("messages", f"Messages of the role {given['role']} are not supported: no tools here.")
        return {name: value for name, value in given.items() if name not in cls.EMPTY}

    @property
    def text(self) -> str:
        """The whole content as text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

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


class CompletionRequest(_Request):
    """POST /v1/completions: a prompt, or several, as text or as token ids."""

    prompt: str | Annotated[list[str], _SHORT] | Tokens | Annotated[list[Tokens], _SHORT]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)

    @property
    def most_new(self) -> int | None:
        """Most tokens to generate; None: the default of a completion."""
        return self.max_tokens

    @model_validator(mode="after")
    def _agree(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise not_possible("max_tokens", "max_tokens 0 generates nothing: it needs echo: true.")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise not_supported("best_of", "best_of is not supported: ask for n answers, and choose.")
        return self


class TokenizeRequest(_Strict):
    """POST /tokenize: a text, or messages put into the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise not_possible("prompt", "Give either prompt or messages.")
        return self


class DetokenizeRequest(_Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Tokens
