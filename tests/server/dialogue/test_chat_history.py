"""Messages as clients and other servers write them: parts, notes in the history, whole numbers as floats."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.server.dialogue import templates
from tests.server.dialogue.conftest import Scripted
from tests.server.dialogue.test_chat_tools import USER, WIRE_TOOLS

Speak = Callable[..., Scripted]
PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [PLAIN, templates.PARTS, templates.FIRST_PART, templates.MAPPED, templates.EITHER])
def test_parts_are_not_lost_and_not_run_together(speak: Speak, template: str) -> None:
    model = speak(template, "Yes.")
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two", "cache_control": {"type": "x"}}]
    for content, told in ((parts, "one\ntwo"), ("one", "one"), ([parts[0]], "one"), ([], ""), (None, "")):
        assert model.ask({"role": "user", "content": content}).status_code == 200
        assert model.prompt == f"<|user|>{told}"


@pytest.mark.parametrize(
    "notes",
    [
        {"reasoning": None, "tool_call_id": None, "thinking_blocks": [], "id": "msg_1", "name": None},
        {"reasoning_content": None, "cache_control": {"type": "ephemeral"}, "annotations": [], "refusal": None},
        {
            "audio": None,
            "function_call": None,
            "tool_calls": [],
            "parsed": None,
            "provider_specific_fields": {"a": [1]},
        },
        {"reasoning_details": [], "images": [], "type": "message", "status": "completed", "index": 0},
        {"reasoning_content": "", "thinking": "", "name": "", "tool_calls": None, "logprobs": None},
    ],
)
def test_notes_of_other_servers_in_the_history(speak: Speak, notes: dict[str, Any]) -> None:
    model = speak(PLAIN, "Yes.")
    for role in ("user", "assistant", "system"):
        asked = model.ask({"role": role, "content": "a", **notes}, USER)
        assert asked.status_code == 200, asked.text
        assert model.prompt == f"<|{role}|>a<|user|>Hi"


def test_a_refusal_in_the_history_is_what_was_said(speak: Speak) -> None:
    model = speak(PLAIN, "Yes.")
    model.ask({"role": "assistant", "content": None, "refusal": "No."}, USER)
    assert model.prompt == "<|assistant|>No.<|user|>Hi"
    model.ask({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, USER)
    assert model.prompt == "<|assistant|>No.<|user|>Hi"


@pytest.mark.parametrize(
    "call",
    [
        {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"count": 1}'}},
        {"id": "a", "type": "function", "index": 0, "function": {"name": "look", "arguments": {"count": 1}}},
        {"id": None, "function": {"name": "look", "arguments": '{"count": 1}'}, "extra_content": {"x": 1}},
        {"function": {"name": "look", "arguments": '{"count": 1}', "parsed_arguments": {"count": 1}}, "x": 1},
    ],
)
def test_calls_in_several_spellings(speak: Speak, call: dict[str, Any]) -> None:
    model = speak(templates.HERMES, "Yes.")
    answer = {"role": "tool", "content": [{"type": "text", "text": "1"}], "name": "look"}
    asked = model.ask(USER, {"role": "assistant", "tool_calls": [call]}, answer, tools=WIRE_TOOLS)
    assert asked.status_code == 200, asked.text
    assert '<tool_call>{"name": "look", "arguments": {"count": 1}}</tool_call>' in model.prompt
    assert "<tool_response>1</tool_response>" in model.prompt


def test_answers_without_an_id_are_those_of_the_calls_in_order(speak: Speak) -> None:
    model = speak(templates.HARMONY, "Yes.")
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("look", "write")]
    answers = [{"role": "tool", "content": text} for text in ("first", "second")]
    assert model.ask(USER, {"role": "assistant", "tool_calls": calls}, *answers, tools=WIRE_TOOLS).status_code == 200
    assert 'functions.look<|message|>"first"' in model.prompt
    assert 'functions.write<|message|>"second"' in model.prompt


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}, "messages"),
        ({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}, "messages"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
            "messages.0.tool_calls.0.function.name",
        ),
        ({"role": "assistant", "tool_calls": [5]}, "messages.0.tool_calls.0"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "messages.0.tool_calls.0.function"),
        ({"role": "assistant", "tool_calls": {}}, "messages.0.tool_calls"),
        ({"role": "tool", "content": 5}, "messages.0.content"),
        ({"role": "function", "name": "f", "content": "5"}, "messages"),
        ({"role": "assistant", "content": "a", "function_call": {"name": "f", "arguments": "{}"}}, "messages"),
        ({"role": "user", "content": [{"type": "refusal"}]}, "messages.0.content.0.text"),
        ({"role": "user", "content": [{"type": "file", "file": {}}]}, "messages"),
        ({"role": "assistant", "content": "a", "thinking_blocks": "x"}, "messages.0.thinking_blocks"),
    ],
)
def test_messages_that_are_wrong_are_named(speak: Speak, message: dict[str, Any], param: str) -> None:
    response = speak(templates.HERMES, "Yes.").ask(message, tools=WIRE_TOOLS)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_whole_numbers_as_floats(speak: Speak) -> None:
    model = speak(PLAIN, "Yes, and much more.")
    whole = {"n": 2, "seed": 7, "top_k": 5, "min_tokens": 1, "top_logprobs": 2}
    asked = {"max_tokens": 4.0, "logprobs": True, **{name: float(value) for name, value in whole.items()}}
    assert model.ask(**asked).status_code == 200
    request = model.engine.requests[-1]
    assert (request.max_new_tokens, request.sampling.top_k, request.num_top_logprobs) == (4, 5, 2)
    assert type(request.max_new_tokens) is int
    assert type(request.sampling.seed) is int
    completions = {"prompt": [5.0, 6.0], "max_tokens": 4.0, "logprobs": 2.0, "n": 1.0, "best_of": 1.0, "echo": True}
    assert model.client.post("/v1/completions", json=completions).status_code == 200
    assert [type(one) for one in model.engine.requests[-1].prompt_ids] == [int, int]
    assert model.client.post("/v1/completions", json={"prompt": [[5.0], [6]]}).status_code == 200
    assert model.client.post("/detokenize", json={"tokens": [5.0]}).status_code == 200
    for name in (*whole, "max_tokens", "max_completion_tokens"):
        body = json.dumps({"messages": [USER], "logprobs": True, name: "X"})
        for value in ("4.5", "1e999", "true"):
            content, kind = body.replace('"X"', value), {"content-type": "application/json"}
            response = model.client.post("/v1/chat/completions", content=content, headers=kind)
            assert response.status_code == 400, (name, value)
            assert response.json()["error"]["param"] == name


def test_no_limit_by_minus_one(speak: Speak) -> None:
    model = speak(PLAIN, "Yes.")
    for name in ("max_tokens", "max_completion_tokens"):
        assert model.ask(**{name: -1}).status_code == 200
        assert model.engine.requests[-1].max_new_tokens is None
        assert model.ask(**{name: -1.0}).status_code == 200
        assert model.ask(**{name: -2}).status_code == 400
    assert model.ask(max_tokens=-1, min_tokens=3).status_code == 200
    assert model.client.post("/v1/completions", json={"prompt": "a", "max_tokens": -1}).status_code == 200
    assert model.engine.requests[-1].max_new_tokens is None
    assert model.client.post("/v1/completions", json={"prompt": "a", "max_tokens": -2}).status_code == 400
