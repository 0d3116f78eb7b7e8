"""POST /v1/chat/completions: answer a conversation with the next message, whole or streamed."""

import math
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest

from foreroute.batching.requests import Finished, NewToken, Request
from foreroute.server.api.answers import (
    Answers,
    Choice,
    biased_ids,
    check_counts,
    check_model,
    gather,
    sampling_of,
    usage,
)
from foreroute.server.api.problems import ApiError, not_possible
from foreroute.server.api.schema import ChatRequest
from foreroute.server.api.sse import EventStream
from foreroute.server.api.token_text import TokenTexts
from foreroute.server.backend import Serving
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
    if len(asked.messages) > settings.limits.messages:
        raise not_possible("messages", f"There are {len(asked.messages)} messages; at most {settings.limits.messages}.")
    serving.prompts.check_ids(biased_ids(asked, settings), "logit_bias")
    messages = [{"role": message.role, "content": message.text} for message in asked.messages]
    prompt_ids = await serving.prompts.chat(messages)
    if not prompt_ids:
        raise not_possible("messages", "The conversation comes to no token at all.")
    requests = [
        Request(
            prompt_ids=prompt_ids,
            max_new_tokens=asked.most_new,
            sampling=sampling_of(asked, settings, index),
            stop=stop,
            num_top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            ignore_eos=bool(asked.ignore_eos),
        )
        for index in range(asked.n or 1)
    ]
    answers = Answers(serving.engine, requests, metrics, settings, "messages")
    answers.submit()
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    if asked.stream:
        return EventStream(_chunks(answers, asked, head, serving.prompts.texts), settings, answers.close)
    choices = await gather(http, answers)
    if choices is None:
        return None
    return {
        **head,
        "object": "chat.completion",
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": _logprobs(choice.steps, serving.prompts.texts) if asked.logprobs else None,
                "finish_reason": _reason(choice),
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage(choices, len(choices)),
    }


async def _chunks(
    answers: Answers, asked: ChatRequest, head: dict[str, Any], texts: TokenTexts
) -> AsyncIterator[dict[str, Any]]:
    head = {**head, "object": "chat.completion.chunk"}
    if asked.wants_usage:
        head["usage"] = None

    def chunk(index: int, delta: dict[str, Any], steps: list[NewToken], reason: str | None = None) -> dict[str, Any]:
        logprobs = _logprobs(steps, texts) if asked.logprobs and steps else None
        return {**head, "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}

    with answers:
        choices = [Choice() for _ in range(asked.n or 1)]
        # Tokens whose text is held back: part of a character, or what may become a stop text.
        held: list[list[NewToken]] = [[] for _ in choices]
        for index in range(len(choices)):
            yield chunk(index, {"role": "assistant", "content": ""}, [])
        async for index, event in answers:
            choices[index].add(event)
            text = ""
            if isinstance(event, NewToken):
                held[index].append(event)
                text = event.text
            elif isinstance(event, Finished):
                text = event.text
            is_last = isinstance(event, Finished)
            if text or (is_last and held[index] and asked.logprobs):
                yield chunk(index, {"content": text}, held[index])
                held[index] = []
            if is_last:
                yield chunk(index, {}, [], _reason(choices[index]))
        if asked.wants_usage:
            yield {**head, "choices": [], "usage": usage(choices, len(choices))}


def _reason(choice: Choice) -> str:
    assert choice.end is not None
    return choice.end.reason


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
