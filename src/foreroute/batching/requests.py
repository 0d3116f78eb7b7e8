"""What is asked of an engine that answers several requests at once, and what it tells: plain data, no tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from foreroute.structured.compiler import CompiledGrammar


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: transformers' names and meanings, and OpenAI's penalties.

    temperature 0 takes the likeliest. None leaves the model's own setting; top_k 0 is none.
    min_tokens: new tokens before which the model's own end cannot come.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """A prompt, and what is wanted of it.

    max_new_tokens: None: as many as the engine has room for; 0: the prompt's scores alone.
    stop: texts that end the answer, and are not part of it; so do those of the model's own settings (stop_strings).
    num_top_logprobs: None: no logprobs; else how many of the likeliest tokens come with each.
    wants_prompt_scores: a PromptScored event comes before the first step.
    ignore_eos: the model's own ends, tokens and texts, do not end the answer.
    shown_special: special tokens whose text is part of the answer's, as they mark its parts; others are left out.
    grammar: what the answer has to look like; it ends where that allows nothing more.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop: Sequence[str] = ()
    num_top_logprobs: int | None = None
    wants_prompt_scores: bool = False
    ignore_eos: bool = False
    shown_special: Sequence[str] = ()
    grammar: "CompiledGrammar | None" = None


# Likeliest first: (token id, logprob).
Top = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class PromptProgress:
    """Prompt tokens computed so far."""

    done: int
    total: int


@dataclass(frozen=True)
class PromptScored:
    """logprobs and top: one entry per prompt token; None for the first, before which there is nothing."""

    logprobs: Sequence[float | None]
    top: Sequence[Top | None]


@dataclass(frozen=True)
class NewToken:
    """A token, and the text that it completes (whole characters; "" while one is half there)."""

    token_id: int
    text: str
    logprob: float | None = None
    top: Top = ()


@dataclass(frozen=True)
class Finished:
    """The last event. reason: stop, length, cancelled or error (then `error` says what). text: what was still held.

    is_refusal: of an error: the request asked for what cannot be done. stop_text: the stop string that ended it, if one
    did.
    """

    reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    text: str = ""
    error: str | None = None
    is_refusal: bool = False
    stop_text: str | None = None


AnswerEvent = PromptProgress | PromptScored | NewToken | Finished


@dataclass(frozen=True)
class EngineState:
    """Right now: requests computed and waiting, and KV blocks (of one token, where the engine has no larger ones).

    prefix_bytes: kept of earlier prompts. So far: prompts that were looked up there, hits, and tokens that were not
    computed again.
    drafted, accepted, verify_steps: tokens that were drafted, those that answers kept, and the steps that verified
    them, so far; None where nothing drafts. set_aside: times that an answer was set aside so far, for want of room or
    to let another begin.
    """

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks: int
    prefix_bytes: int = 0
    prefix_lookups: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    drafted: int | None = None
    accepted: int | None = None
    verify_steps: int | None = None
    set_aside: int = 0


class Engine(Protocol):
    """Answers requests. All methods may be called from any thread, and none of them waits for a forward pass."""

    def submit(self, request: Request, on_event: Callable[[Any], None]) -> Any:
        """Queue a request; `on_event` is called from the engine's thread. Returns a handle for `cancel`.

        Raises:
            QueueFullError, ContextLengthError: before anything is queued.
        """

    def cancel(self, handle: Any) -> None:
        """End a request; one that has ended already is left alone."""

    def state(self) -> EngineState:
        """What it does right now."""

    def close(self) -> None:
        """End all requests and stop."""
