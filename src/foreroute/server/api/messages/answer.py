"""POST /v1/messages: answer with the next message, whole or streamed; and count a conversation's tokens."""

import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest

from foreroute.batching.requests import Sampling
from foreroute.server.api.answers import Answers, check_model, check_stops, gather
from foreroute.server.api.messages.schema import CountRequest, MessagesRequest
from foreroute.server.api.problems import not_supported
from foreroute.server.api.sse import EventStream, StreamForm, event
from foreroute.server.api.structure import schema_grammar
from foreroute.server.api.turns import TurnChoice, TurnRequest, begin_turn
from foreroute.server.backend import Serving
from foreroute.server.dialogue.messages import ToolCall
from foreroute.server.dialogue.parsing.events import CallArguments, CallBegan, Content, Event, Reasoning
from foreroute.server.dialogue.parsing.json_text import object_of
from foreroute.server.settings import ServerSettings
from foreroute.server.watching.metrics import ServerMetrics

_FORM = StreamForm(event({"type": "ping"}, is_named=True), b"", lambda error: error.anthropic_body, is_named=True)
# Clients leave out thinking without a signature when they send it back; there is nothing that it could prove here.
_SIGNATURE = "unsigned"


async def count_tokens(asked: CountRequest, serving: Serving, settings: ServerSettings) -> dict[str, int]:
    """Count the tokens of the prompt that `asked` makes.

    Raises:
        ApiError: there is no such prompt.
    """
    check_model(asked.model, settings)
    return {"input_tokens": len((await serving.prompts.chat(asked.dialogue())).prompt_ids)}


async def answer_messages(
    asked: MessagesRequest, http: HttpRequest, serving: Serving, metrics: ServerMetrics, settings: ServerSettings
) -> dict[str, Any] | EventStream | None:
    """Answer `asked` by `serving`, or stream; None if the client of `http` has left. metrics, settings: see `Answers`.

    Raises:
        ApiError: the request cannot be served; nothing has been queued.
    """
    name = check_model(asked.model, settings)
    limits = settings.limits
    stop = check_stops("stop_sequences", asked.stop_sequences or [], limits.stop_sequences, limits)
    if asked.messages[-1].role == "assistant":
        raise not_supported("messages", "The last message must be a user's: an answer cannot be begun for the model.")
    sampling = Sampling(
        temperature=settings.temperature if asked.temperature is None else asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        seed=settings.seed,
    )
    wanted = asked.format_asked
    grammar = None if wanted is None else await schema_grammar(*wanted)
    turn = TurnRequest(asked.dialogue(), [sampling], asked.max_tokens, stop, grammar=grammar)
    answers, new_choice = await begin_turn(turn, serving, metrics, settings)
    head: dict[str, Any] = {
        "id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": name, "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": _usage(answers.prompt_tokens, 0, 0),
    }  # fmt: skip
    if asked.stream:
        return EventStream(_events(answers, new_choice(), head, stop), settings, answers.close, _FORM)
    found = await gather(http, answers, new_choice)
    if found is None:
        return None
    return {**head, "content": _blocks(found[0].parts), **_end(found[0], stop), "usage": _usage_of(found[0])}


async def _events(
    answers: Answers, choice: TurnChoice, head: dict[str, Any], stop: Sequence[str]
) -> AsyncIterator[dict[str, Any]]:
    writer = _BlockWriter()
    with answers:
        yield {"type": "message_start", "message": head}
        yield {"type": "ping"}
        async for _, one in answers:
            for part in choice.take(one):
                for written in writer.write(part):
                    yield written
        for written in writer.close():
            yield written
        yield {"type": "message_delta", "delta": _end(choice, stop), "usage": _usage_of(choice)}
        yield {"type": "message_stop"}


class _BlockWriter:
    """Writes an answer's parts as the events of content blocks.

    A call is held back until it is whole: clients parse its input as it comes, and fail on what is no JSON; what proves
    to be no call is text.
    """

    def __init__(self) -> None:
        self._at, self._open = -1, ""
        self._call, self._arguments = ("", ""), ""

    def write(self, part: Event) -> Iterator[dict[str, Any]]:
        """Write the next part."""
        if isinstance(part, Content):
            yield from self._said("text", "text_delta", part.text)
        elif isinstance(part, Reasoning):
            yield from self._said("thinking", "thinking_delta", part.text)
        elif isinstance(part, CallBegan):
            self._call, self._arguments = (part.id, part.name), ""
        elif isinstance(part, CallArguments):
            self._arguments += part.text
        elif part.is_valid:
            yield from self._called(ToolCall(*self._call, self._arguments))
        else:
            yield from self._said("text", "text_delta", part.raw)

    def close(self) -> Iterator[dict[str, Any]]:
        """End the block that is open."""
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": _SIGNATURE})
        if self._open:
            yield {"type": "content_block_stop", "index": self._at}
        self._open = ""

    def _said(self, kind: str, delta: str, text: str) -> Iterator[dict[str, Any]]:
        if not text:
            return
        if self._open != kind:
            more = {"signature": ""} if kind == "thinking" else {}
            yield from self._begin(kind, {"type": kind, kind: "", **more})
        yield self._delta({"type": delta, kind: text})

    def _called(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        yield from self._begin("tool_use", {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        yield from self.close()

    def _begin(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.close()
        self._open, self._at = kind, self._at + 1
        yield {"type": "content_block_start", "index": self._at, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._at, "delta": delta}


def _blocks(parts: Sequence[Event]) -> list[dict[str, Any]]:
    """The blocks of a whole answer: those that its stream's events add up to."""
    writer, blocks = _BlockWriter(), []
    for written in [*(one for part in parts for one in writer.write(part)), *writer.close()]:
        if written["type"] == "content_block_start":
            blocks.append(written["content_block"])
        elif written["type"] == "content_block_delta":
            delta = {name: one for name, one in written["delta"].items() if name != "type"}
            ((name, text),) = delta.items()
            if name == "partial_json":
                blocks[-1]["input"] = object_of(text) or {}
            else:
                blocks[-1][name] += text
    return blocks


def _end(choice: TurnChoice, stop: Sequence[str]) -> dict[str, Any]:
    """Why the answer has ended."""
    assert choice.end is not None
    if choice.is_for_tools:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if choice.end.reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if choice.end.stop_text in stop:
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.end.stop_text}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage_of(choice: TurnChoice) -> dict[str, int]:
    assert choice.end is not None
    return _usage(choice.end.prompt_tokens, choice.end.cached_tokens, choice.end.completion_tokens)


def _usage(prompt: int, cached: int, new: int) -> dict[str, int]:
    """Anthropic's usage: tokens that came from a cache are not among the input's."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": new,
    }
