"""An answer's parts as the events of output items, in OpenAI's order.

A call is held back until it is whole: clients run one that is done, and what proves to be no call is text.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from foreroute.server.api.responses.tools import NamedTool
from foreroute.server.dialogue.parsing.events import CallArguments, CallBegan, Content, Event, Reasoning
from foreroute.server.dialogue.parsing.json_text import object_of


@dataclass
class _Open:
    """The item that is being written. kind: message, reasoning, call or custom. text: what it says so far."""

    kind: str
    item: dict[str, Any]
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


# By kind: the type of the content's part, the events of its text, and what these have besides.
_TEXTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "message": ("output_text", "response.output_text", {"annotations": [], "logprobs": []}, {"logprobs": []}),
    "reasoning": ("reasoning_text", "response.reasoning_text", {}, {}),
}


class ItemWriter:
    """Writes events without their sequence_number.

    Args:
        tools: by the names by which the model knows them. Calls of custom ones are text: the value `input` of their
            arguments.
    Attributes:
        output: the items that are complete.
    """

    def __init__(self, tools: Mapping[str, NamedTool]) -> None:
        self._tools = tools
        self._open: _Open | None = None
        self._begun: CallBegan | None = None
        self._written: list[str] = []
        self.output: list[dict[str, Any]] = []

    def write(self, part: Event) -> Iterator[dict[str, Any]]:
        """Write the next part."""
        if isinstance(part, (Content, Reasoning)):
            if part.text:
                yield from self._said("message" if isinstance(part, Content) else "reasoning", part.text)
        elif isinstance(part, CallBegan):
            self._begun, self._written = part, []
        elif isinstance(part, CallArguments):
            self._written.append(part.text)
        elif part.is_valid:
            assert self._begun is not None
            yield from self._call(self._begun, "".join(self._written))
        elif part.raw:
            yield from self._said("message", part.raw)

    def close(self, *, is_whole: bool = True) -> Iterator[dict[str, Any]]:
        """End the item that is open, if one is. is_whole: it was not cut off."""
        if self._open is None:
            return
        done, self._open = self._open, None
        ends = {"message": _end_of_text, "reasoning": _end_of_text, "call": _end_of_call, "custom": _end_of_custom}
        end: Callable[[_Open], Iterator[dict[str, Any]]] = ends[done.kind]
        for event in end(done):
            yield self._at(done, event)
        if "status" in done.item:
            done.item["status"] = "completed" if is_whole else "incomplete"
        yield {"type": "response.output_item.done", "output_index": len(self.output), "item": done.item}
        self.output.append(done.item)

    def _said(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        part, event, more, beside = _TEXTS[kind]
        if self._open is None or self._open.kind != kind:
            head: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            name = "msg" if kind == "message" else "rs"
            item = {"id": _id(name), "type": kind, **head, "content": [], "status": "in_progress"}
            yield from self._begin(kind, item)
            assert self._open is not None
            empty = {"type": part, "text": "", **more}
            yield self._at(self._open, {"type": "response.content_part.added", "content_index": 0, "part": empty})
        self._open.parts.append(text)
        yield self._at(self._open, {"type": f"{event}.delta", "content_index": 0, "delta": text, **beside})

    def _call(self, part: CallBegan, arguments: str) -> Iterator[dict[str, Any]]:
        tool = self._tools[part.name]
        named = {"call_id": part.id, "name": tool.name, **({"namespace": tool.namespace} if tool.namespace else {})}
        if tool.is_custom:
            yield from self._begin("custom", {"id": _id("ctc"), "type": "custom_tool_call", **named, "input": ""})
        else:
            item = {"id": _id("fc"), "type": "function_call", **named, "arguments": ""}
            yield from self._begin("call", {**item, "status": "in_progress"})
        assert self._open is not None
        self._open.parts.append(arguments)
        if self._open.kind == "call":
            yield self._at(self._open, {"type": "response.function_call_arguments.delta", "delta": arguments})
        yield from self.close()

    def _begin(self, kind: str, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.close()
        self._open = _Open(kind, item)
        # A copy: the item changes until it is done.
        yield {"type": "response.output_item.added", "output_index": len(self.output), "item": {**item}}

    def _at(self, one: _Open, event: dict[str, Any]) -> dict[str, Any]:
        """The event with the place of its item."""
        return {"type": event["type"], "item_id": one.item["id"], "output_index": len(self.output), **event}


def _end_of_text(done: _Open) -> Iterator[dict[str, Any]]:
    part, event, more, beside = _TEXTS[done.kind]
    whole = {"type": part, "text": done.text, **more}
    done.item["content"] = [whole]
    yield {"type": f"{event}.done", "content_index": 0, "text": done.text, **beside}
    yield {"type": "response.content_part.done", "content_index": 0, "part": whole}


def _end_of_call(done: _Open) -> Iterator[dict[str, Any]]:
    done.item["arguments"] = done.text
    yield {"type": "response.function_call_arguments.done", "name": done.item["name"], "arguments": done.text}


def _end_of_custom(done: _Open) -> Iterator[dict[str, Any]]:
    text = (object_of(done.text) or {}).get("input")
    done.item["input"] = text if isinstance(text, str) else done.text
    yield {"type": "response.custom_tool_call_input.delta", "delta": done.item["input"]}
    yield {"type": "response.custom_tool_call_input.done", "input": done.item["input"]}


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
