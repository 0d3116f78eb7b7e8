"""The model that ships, which knows no tools, calls one where it must, by all three APIs; and says what stopped it."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")

from tests.server.process import Process, serving

SCHEMA = {
    "type": "object", "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["count"], "additionalProperties": False,
}  # fmt: skip
HI = [{"role": "user", "content": "Hi"}]
CLAUDE = {"messages": HI, "max_tokens": 100}


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with serving("--ctx-size", "512", "--tool-parser", "hermes") as served:
        yield served


def ask(server: Process, path: str, **body: Any) -> Any:
    response = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=100)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_call_that_must_be(server: Process) -> None:
    function = {"name": "look", "parameters": SCHEMA}
    tools: list[Any] = [{"type": "function", "function": function}]
    found = ask(server, "chat/completions", messages=HI, tools=tools, tool_choice="required", parallel_tool_calls=False)
    (choice,) = found["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    arguments = [json.loads(call["function"]["arguments"])]
    choose = {"type": "function", "name": "look"}
    found = ask(server, "responses", input="Hi", tools=[{"type": "function", **function}], tool_choice=choose)
    (item,) = found["output"]
    assert (item["type"], found["status"]) == ("function_call", "completed")
    arguments.append(json.loads(item["arguments"]))
    blocks = [{"name": "look", "input_schema": SCHEMA}]
    found = ask(server, "messages", **CLAUDE, tools=blocks, tool_choice={"type": "tool", "name": "look"})
    (block,) = found["content"]
    assert (block["type"], found["stop_reason"]) == ("tool_use", "tool_use")
    for one in (*arguments, block["input"]):
        assert set(one) == {"count"}
        assert 0 <= one["count"] <= 99


def test_what_stopped_it(server: Process) -> None:
    said = ask(server, "messages", **CLAUDE)["content"][0]["text"]
    stop = said[3]
    found = ask(server, "messages", **CLAUDE, stop_sequences=[stop])
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", stop)
    assert "".join(block["text"] for block in found["content"]) == said[: said.index(stop)]
