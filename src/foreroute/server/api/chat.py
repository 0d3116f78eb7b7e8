"""POST /v1/chat/completions: answer a conversation with the next message, whole or streamed."""

import math
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest

from foreroute.batching.requests import Finished, NewToken
from foreroute.server.api.answers import (
    Answers,
    biased_ids,
    check_counts,
    check_model,
    gather,
    sampling_of,
    usage,
)
from foreroute.server.api.problems import ApiError
from foreroute.server.api.schema import ChatRequest
from foreroute.server.api.sse import EventStream
from foreroute.server.api.structure import grammar_asked
from foreroute.server.api.token_text import TokenTexts
from foreroute.server.api.turns import TurnChoice, TurnRequest, begin_turn
from foreroute.server.backend import Serving
from foreroute.server.dialogue.parsing.events import (
    CallArguments,
    CallBegan,
    Content,
    Event,
    ParsedAnswer,
    Reasoning,
)
from foreroute.server.settings import ServerSettings
from foreroute.server.watching.metrics import ServerMetrics


async def complete_chat(
    asked: ChatRequest, http: HttpRequest, serving: Serving, metrics: ServerMetrics, settings: ServerSettings
) -> dict[str, Any] | EventStream | None:
    """Answer `asked` by `serving`, or stream; None if the client of `http` has left. metrics, settings: see `Answers`.

    Raises:
        ApiError: the request cannot be served; nothing has been queued.
    """
    name, stop = check_model(asked.model, settings), check_counts(asked, settings)
    serving.prompts.check_ids(biased_ids(asked, settings), "logit_bias")
    grammar = await grammar_asked(asked)
    turn = TurnRequest(
        asked.dialogue(),
        [sampling_of(asked, settings, index) for index in range(asked.n or 1)],
        asked.most_new,
        stop,
        (asked.top_logprobs or 0) if asked.logprobs else None,
        bool(asked.ignore_eos),
        grammar,
    )
    answers, new_choice = await begin_turn(turn, serving, metrics, settings)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    if asked.stream:
        choices = [new_choice() for _ in turn.samplings]
        return EventStream(_chunks(answers, choices, asked, head, serving.prompts.texts), settings, answers.close)
    found = await gather(http, answers, new_choice)
    if found is None:
        return None
    return {
        **head,
        "object": "chat.completion",
        "choices": [
            {
                "index": index,
                "message": _message(choice.parsed),
                "logprobs": _logprobs(choice.steps, serving.prompts.texts) if asked.logprobs else None,
                "finish_reason": _reason(choice),
            }
            for index, choice in enumerate(found)
        ],
        "usage": usage(found, len(found)),
    }


def _message(parsed: ParsedAnswer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content, "refusal": None}
    if parsed.reasoning:
        message["reasoning_content"] = parsed.reasoning
    calls = parsed.calls if parsed.cut is None else [*parsed.calls, parsed.cut]
    if calls:
        message["content"] = parsed.content or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


async def _chunks(
    answers: Answers, choices: list[TurnChoice], asked: ChatRequest, head: dict[str, Any], texts: TokenTexts
) -> AsyncIterator[dict[str, Any]]:
    head = {**head, "object": "chat.completion.chunk"}
    if asked.wants_usage:
        head["usage"] = None

    def chunk(index: int, delta: dict[str, Any], steps: list[NewToken], reason: str | None = None) -> dict[str, Any]:
        logprobs = _logprobs(steps, texts) if asked.logprobs and steps else None
        return {**head, "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}

    with answers:
        # Tokens whose text is held back: part of a character, or what may become a stop text or a tool call.
        held: list[list[NewToken]] = [[] for _ in choices]
        for index in range(len(choices)):
            yield chunk(index, {"role": "assistant", "content": ""}, [])
        async for index, event in answers:
            if isinstance(event, NewToken):
                held[index].append(event)
            deltas = [delta for part in choices[index].take(event) if (delta := _delta(part)) is not None]
            is_last = isinstance(event, Finished)
            if is_last and not deltas and held[index] and asked.logprobs:
                deltas = [{"content": ""}]
            for delta in deltas:
                yield chunk(index, delta, held[index])
                held[index] = []
            if is_last:
                yield chunk(index, {}, [], _reason(choices[index]))
        if asked.wants_usage:
            yield {**head, "choices": [], "usage": usage(choices, len(choices))}


def _delta(part: Event) -> dict[str, Any] | None:
    """A part of an answer as the delta of a chunk; None: nothing is sent for it."""
    if isinstance(part, Content):
        return {"content": part.text}
    if isinstance(part, Reasoning):
        return {"reasoning_content": part.text}
    if isinstance(part, CallBegan):
        function = {"name": part.name, "arguments": ""}
        return {"tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": function}]}
    if isinstance(part, CallArguments):
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
    return None


def _reason(choice: TurnChoice) -> str:
    assert choice.end is not None
    return "tool_calls" if choice.is_for_tools else choice.end.reason


def _logprobs(steps: list[NewToken], texts: TokenTexts) -> dict[str, Any]:
    return {
        "content": [
            {
                **_token(step.token_id, step.logprob, texts),
                "top_logprobs": [_token(token_id, logprob, texts) for token_id, logprob in step.top],
            }
            for step in steps
        ],
        "refusal": None,
    }


def _token(token_id: int, logprob: float | None, texts: TokenTexts) -> dict[str, Any]:
    return {"token": texts.text(token_id), "logprob": finite(logprob), "bytes": texts.bytes(token_id)}


def finite(logprob: float | None) -> float | None:
    """Replace infinity, which JSON lacks, by OpenAI's own least logprob.

    Raises:
        ApiError: it is NaN: what the model computed is not usable.
    """
    if logprob is None:
        return None
    if not logprob < math.inf:
        raise ApiError(
            500,
            f"The model gave a logprob of {logprob}: its numbers are not to be used. Its weights may be damaged, or "
            "the compute dtype too narrow for them (`foreroute verify` finds out; try --dtype float32).",
            code="engine_error",
        )
    return max(logprob, -9999.0)
