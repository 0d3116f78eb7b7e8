"""POST /v1/messages and count_tokens: blocks in and out, whole and streamed, stop reasons, errors, keys."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from foreroute.server.dialogue.parsing.formats import format_named
from foreroute.server.settings import ServerSettings
from tests.server.dialogue import templates
from tests.server.dialogue.answers import TOOLS, VALID, Written
from tests.server.dialogue.conftest import Scripted

Speak = Callable[..., Scripted]
USER = {"role": "user", "content": "Hi"}
WIRE_TOOLS = [
    {"name": tool.name, "description": f"Does {tool.name}.", "input_schema": tool.definition["parameters"]}
    for tool in TOOLS.values()
]
LOOK = '<tool_call>\n{"name": "look", "arguments": {"count": 1}}\n</tool_call>'


def ask(model: Any, *messages: Any, **more: Any) -> Any:
    body = {"model": "model", "max_tokens": 4096, "messages": list(messages) or [USER], **more}
    return model.client.post("/v1/messages", json=body)


def streamed(response: Any) -> dict[str, Any]:
    """The message that a stream's events add up to; checks their order."""
    assert response.status_code == 200, response.text
    message: dict[str, Any] = {}
    is_open, kinds = False, []
    for written in response.text.strip().split("\n\n"):
        name, data = written.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        kinds.append(event["type"])
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            assert not is_open
            is_open, said = True, ""
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            assert is_open
            assert event["index"] == len(message["content"]) - 1
            block, delta = message["content"][-1], event["delta"]
            if delta["type"] == "input_json_delta":
                said += delta["partial_json"]
                block["input"] = json.loads(said)
            else:
                key = delta["type"].removesuffix("_delta")
                assert key in (block["type"], "signature")
                block[key] += delta[key]
        elif event["type"] == "content_block_stop":
            is_open = False
        elif event["type"] == "message_delta":
            message.update(event["delta"], usage=event["usage"])
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert not is_open
    return message


def both(model: Any, *messages: Any, **more: Any) -> dict[str, Any]:
    """The answer, which is the same whole and streamed."""
    response = ask(model, *messages, **more)
    assert response.status_code == 200, response.text
    whole, parts = response.json(), streamed(ask(model, *messages, stream=True, **more))
    for one in (whole, parts):
        assert one.pop("id").startswith("msg_")
        for block in one["content"]:
            if block["type"] == "tool_use":
                assert block.pop("id")
    assert parts == whole
    return whole


@pytest.mark.parametrize("written", VALID, ids=[f"{one.format}-{at}" for at, one in enumerate(VALID)])
def test_every_format_whole_and_streamed(speak: Speak, written: Written) -> None:
    own = format_named(written.format)
    model = speak(templates.HARMONY if own.has_channels else templates.HERMES, written.text, own.markers, own)
    found = both(model, tools=WIRE_TOOLS)
    said = {"text": "", "thinking": ""}
    for block in found["content"]:
        if block["type"] in said:
            said[block["type"]] += block[block["type"]]
    assert said == {"text": written.content, "thinking": written.reasoning}
    calls = [(block["name"], block["input"]) for block in found["content"] if block["type"] == "tool_use"]
    assert calls == [(name, json.loads(arguments)) for name, arguments in written.calls]
    assert found["stop_reason"] == ("tool_use" if calls else "end_turn")


def test_the_shape_of_an_answer(speak: Speak) -> None:
    model = speak(templates.HERMES, "<think>Hm.</think>I look." + LOOK)
    assert both(model, tools=WIRE_TOOLS) == {
        "type": "message", "role": "assistant", "model": "model", "stop_reason": "tool_use", "stop_sequence": None,
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "unsigned"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "name": "look", "input": {"count": 1}},
        ],
        "usage": {
            "input_tokens": len(model.engine.requests[-1].prompt_ids), "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0, "output_tokens": len("<think>Hm.</think>I look." + LOOK),
        },
    }  # fmt: skip


def test_the_history_reaches_the_prompt(speak: Speak) -> None:
    model = speak(templates.HERMES, "It is 1.")
    hint = {"cache_control": {"type": "ephemeral"}}
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "One", **hint}, {"type": "text", "text": "Two"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "unsigned"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"count": 1}},
                {"type": "tool_use", "id": "toolu_2", "name": "look", "input": {"count": 2}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "1"}], **hint},
                {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True},
                {"type": "text", "text": "And?"},
            ],
        },
        {"role": "user", "content": "Well?"},
    ]
    system = [{"type": "text", "text": "Be", **hint}, {"type": "text", "text": "brief."}]
    more = {"system": system, "metadata": {"user_id": "x"}, "tools": [{**one, **hint} for one in WIRE_TOOLS]}
    assert both(model, *talk, **more)["content"] == [{"type": "text", "text": "It is 1."}]
    prompt = model.prompt
    assert prompt.startswith("<|system|>Be\nbrief.")
    assert "<|user|>One\nTwo<|assistant|><think>Hm.</think>I look.<tool_call>" in prompt
    assert '{"name": "look", "arguments": {"count": 2}}' in prompt
    assert "<tool_response>1</tool_response>" in prompt
    assert "<tool_response>The tool failed.</tool_response><|user|>And?\nWell?<|assistant|>" in prompt
    count = model.client.post("/v1/messages/count_tokens?beta=true", json={"messages": talk, **more})
    assert count.json() == {"input_tokens": len(model.engine.requests[-1].prompt_ids)}
    assert model.client.post("/messages/count_tokens", json={"messages": talk, **more}).status_code == 200


def test_choices_of_tools(speak: Speak) -> None:
    model = speak(templates.HERMES, LOOK * 2)
    count = lambda **more: len(both(model, tools=WIRE_TOOLS, **more)["content"])  # noqa: E731
    assert count() == 2
    assert count(tool_choice={"type": "auto", "disable_parallel_tool_use": True}) == 1
    found = both(model, tools=WIRE_TOOLS, tool_choice={"type": "none"})
    assert (found["content"], found["stop_reason"]) == ([{"type": "text", "text": LOOK * 2}], "end_turn")


def test_stop_reasons(speak: Speak) -> None:
    model = speak(templates.HERMES, "Hello")
    assert both(model, max_tokens=3)["stop_reason"] == "max_tokens"
    model.engine.stop_text = "\n\nHuman:"
    found = both(model, stop_sequences=["\n\nHuman:", "x"])
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "\n\nHuman:")
    assert list(model.engine.requests[-1].stop) == ["\n\nHuman:", "x"]
    many = [str(at) for at in range(64)]
    both(model, stop_sequences=many)
    assert list(model.engine.requests[-1].stop) == many
    # One of the model's own settings is no stop sequence of the client.
    assert both(model)["stop_reason"] == "end_turn"


def test_what_is_no_call_is_text(speak: Speak) -> None:
    """In a stream too: clients parse a call's input as it comes, and fail on what is no JSON."""
    text = 'So: <tool_call>{"name": "look", "arguments": {"count": oh}}</tool_call>'
    model = speak(templates.HERMES, text)
    found = both(model, tools=WIRE_TOOLS)
    assert "".join(block["text"] for block in found["content"]) == text
    assert found["stop_reason"] == "end_turn"
    for most in range(1, len(text)):
        assert both(model, tools=WIRE_TOOLS, max_tokens=most)["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"unknown": 1}, "unknown"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"thread": {"type": "continue", "previous_message_id": "msg_1"}}, "thread"),
        ({"messages": []}, "messages"),
        ({"messages": [USER, {"role": "assistant", "content": "I"}]}, "last message"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}]}, "thinking"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]}, "message"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools.0.name"),
        ({"tools": [{"name": "a"}]}, "input_schema"),
        ({"tools": [{"name": "a", "input_schema": {}, "x": 1}]}, "tools.0.x"),
        ({"tools": [{"name": "a", "input_schema": {"type": kind}} for kind in ("object", "array")]}, "'a' and 'a'"),
        ({"tools": WIRE_TOOLS, "tool_choice": {"type": "tool", "name": "other"}}, "other"),
        ({"tool_choice": {"type": "any"}}, "tools"),
        ({"stop_sequences": ["a"] * 65}, "stop_sequences"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_in_their_shape(speak: Speak, more: dict[str, Any], named: str) -> None:
    response = ask(speak(templates.HERMES, "Hello"), **more)
    assert response.status_code == 400, response.text
    body = response.json()
    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert named in body["error"]["message"]


def test_other_statuses(serve: Any) -> None:
    served = serve(ServerSettings(api_keys=("secret",)), context=4096)
    body = {"max_tokens": 4, "messages": [USER]}
    post = lambda path="/v1/messages", **headers: served.client.post(path, json=body, headers=headers)  # noqa: E731
    refused = post()
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
    assert post(**{"x-api-key": "wrong"}).json()["type"] == "error"
    assert post(**{"x-api-key": "secret"}).status_code == 200
    assert post(authorization="Bearer secret").status_code == 200
    assert served.client.post("/v1/chat/completions", json=body).json()["error"]["code"] == "invalid_api_key"
    body["model"] = "other"
    missing = post(**{"x-api-key": "secret"})
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    served = serve(most_open=0)
    busy = served.client.post("/v1/messages", json={"max_tokens": 4, "messages": [USER]})
    assert (busy.status_code, busy.json()["error"]["type"]) == (429, "rate_limit_error")


def test_an_error_in_a_stream(speak: Speak) -> None:
    model = speak(templates.HERMES, "Hello")
    model.engine.error = "The disk is gone."
    last = ask(model, stream=True).text.strip().split("\n\n")[-1]
    assert last.startswith("event: error\ndata: ")
    error = json.loads(last.split("data: ")[1])
    assert error == {"type": "error", "error": {"type": "api_error", "message": "The disk is gone."}}


def test_thinking_and_effort_reach_the_template(speak: Speak) -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}[{{ enable_thinking }} {{ reasoning_effort }}]{# <think> #}"
    )
    model = speak(template, "Hello")
    both(model, thinking={"type": "enabled", "budget_tokens": 1024}, output_config={"effort": "low"})
    assert model.prompt.endswith("[True low]")
    both(model, thinking={"type": "disabled"})
    assert model.prompt.endswith("[False ]")
