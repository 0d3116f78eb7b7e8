"""POST /v1/responses: answer a conversation with the next items, whole or streamed."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest

from foreroute.batching.requests import Sampling
from foreroute.server.api.answers import Answers, check_model, gather
from foreroute.server.api.problems import ApiError, internal
from foreroute.server.api.responses.schema import ResponsesRequest
from foreroute.server.api.responses.writer import ItemWriter
from foreroute.server.api.sse import EventStream, StreamForm
from foreroute.server.api.structure import schema_grammar
from foreroute.server.api.turns import TurnChoice, TurnRequest, begin_turn
from foreroute.server.backend import Serving
from foreroute.server.settings import ServerSettings
from foreroute.server.watching.metrics import ServerMetrics

_FORM = StreamForm(last=b"", is_named=True)


async def answer_responses(
    asked: ResponsesRequest, http: HttpRequest, serving: Serving, metrics: ServerMetrics, settings: ServerSettings
) -> dict[str, Any] | EventStream | None:
    """Answer `asked` by `serving`, or stream; None if the client of `http` has left. metrics, settings: see `Answers`.

    Raises:
        ApiError: the request cannot be served; nothing has been queued.
    """
    name = check_model(asked.model, settings)
    temperature = settings.temperature if asked.temperature is None else asked.temperature
    wanted = asked.format_asked
    grammar = None if wanted is None else await schema_grammar(*wanted)
    turn = TurnRequest(
        asked.dialogue(),
        [Sampling(temperature=temperature, top_p=asked.top_p, seed=settings.seed)],
        asked.max_output_tokens,
        grammar=grammar,
    )
    answers, new_choice = await begin_turn(turn, serving, metrics, settings)
    head, writer = _head(asked, name), ItemWriter(asked.told_tools())
    if asked.stream:
        return EventStream(_numbered(_events(answers, new_choice(), head, writer)), settings, answers.close, _FORM)
    found = await gather(http, answers, new_choice)
    if found is None:
        return None
    for part in found[0].parts:
        for _ in writer.write(part):
            pass
    for _ in writer.close(is_whole=not _is_cut(found[0])):
        pass
    return _finished(head, found[0], writer)


async def _numbered(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    number = 0
    async for one in events:
        yield {**one, "sequence_number": number}
        number += 1


async def _events(
    answers: Answers, choice: TurnChoice, head: dict[str, Any], writer: ItemWriter
) -> AsyncIterator[dict[str, Any]]:
    with answers:
        yield {"type": "response.created", "response": head}
        yield {"type": "response.in_progress", "response": head}
        try:
            async for _, event in answers:
                for part in choice.take(event):
                    for written in writer.write(part):
                        yield written
        except Exception as error:  # noqa: BLE001 - the stream has begun: the error goes into it
            told = error if isinstance(error, ApiError) else internal(error)
            why = {"code": told.code if told.status < 500 else "server_error", "message": told.message}
            failed = {**head, "status": "failed", "error": why, "output": writer.output}
            yield {"type": "response.failed", "response": failed}
            return
        for written in writer.close(is_whole=not _is_cut(choice)):
            yield written
        last = "incomplete" if _is_cut(choice) else "completed"
        yield {"type": f"response.{last}", "response": _finished(head, choice, writer)}


def _is_cut(choice: TurnChoice) -> bool:
    assert choice.end is not None
    return choice.end.reason == "length"


def _head(asked: ResponsesRequest, name: str) -> dict[str, Any]:
    """The response before there is anything in it."""
    effort = asked.reasoning.effort if asked.reasoning is not None else None
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "model": name,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": effort, "summary": None},
        "store": False,
        "temperature": asked.temperature,
        "text": {"format": (asked.text or {}).get("format") or {"type": "text"}},
        "tool_choice": asked.tool_choice or "auto",
        "tools": asked.tools or [],
        "top_p": asked.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _finished(head: dict[str, Any], choice: TurnChoice, writer: ItemWriter) -> dict[str, Any]:
    end = choice.end
    assert end is not None
    is_cut = _is_cut(choice)
    return {
        **head,
        "status": "incomplete" if is_cut else "completed",
        "completed_at": None if is_cut else int(time.time()),
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": writer.output,
        "usage": {
            "input_tokens": end.prompt_tokens,
            "input_tokens_details": {"cached_tokens": end.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": end.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
            "total_tokens": end.prompt_tokens + end.completion_tokens,
        },
    }
