"""Tools over the chat API: what reaches the prompt, calls in whole answers and in streams, choices, errors."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from foreroute.server.dialogue.parsing.formats import FORMATS, format_named
from tests.server.dialogue import templates
from tests.server.dialogue.answers import TOOLS, VALID, Written
from tests.server.dialogue.conftest import Scripted

Speak = Callable[..., Scripted]
WIRE_TOOLS = [{"type": "function", "function": dict(tool.definition)} for tool in TOOLS.values()]
LOOK = '<tool_call>\n{"name": "look", "arguments": {"count": 1}}\n</tool_call>'
USER = {"role": "user", "content": "Hi"}


def streamed(response: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The message that a stream's deltas add up to, as clients add them, and all of its chunks."""
    assert response.status_code == 200, response.text
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    assert not any("error" in chunk for chunk in chunks), chunks[-1]
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": [], "finish_reason": None}
    for chunk in chunks:
        for choice in chunk["choices"]:
            assert message["finish_reason"] is None
            delta = choice["delta"]
            message["content"] += delta.get("content", "")
            message["reasoning_content"] += delta.get("reasoning_content", "")
            for call in delta.get("tool_calls", []):
                if call["index"] == len(message["tool_calls"]):
                    assert call["type"] == "function"
                    message["tool_calls"].append({"id": call["id"], "type": "function", "function": call["function"]})
                else:
                    assert set(call) == {"index", "function"}
                    own = message["tool_calls"][call["index"]]["function"]
                    own["arguments"] += call["function"]["arguments"]
            message["finish_reason"] = choice["finish_reason"]
    return message, chunks


@pytest.mark.parametrize("written", VALID, ids=[f"{one.format}-{at}" for at, one in enumerate(VALID)])
@pytest.mark.parametrize("is_special", [False, True], ids=["text", "special"])
def test_every_format_whole_and_streamed(speak: Speak, written: Written, is_special: bool) -> None:
    """Also where the format's markers are special tokens of the model, which are no text elsewhere."""
    own = format_named(written.format)
    template = templates.HARMONY if own.has_channels else templates.HERMES
    model = speak(template, written.text, own.markers if is_special else (), own)
    found = model.ask(tools=WIRE_TOOLS).json()["choices"][0]
    message = found["message"]
    assert (message["content"] or "") == written.content
    assert message.get("reasoning_content", "") == written.reasoning
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
    assert tuple(calls) == written.calls
    assert found["finish_reason"] == ("tool_calls" if written.calls else "stop")
    whole, _ = streamed(model.ask(tools=WIRE_TOOLS, stream=True))
    assert whole["content"] == written.content
    assert whole["reasoning_content"] == written.reasoning
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in whole["tool_calls"]] == calls
    assert whole["finish_reason"] == found["finish_reason"]


def test_the_shape_of_a_call(speak: Speak) -> None:
    model = speak(templates.HERMES, LOOK * 2)
    choice = model.ask(tools=WIRE_TOOLS).json()["choices"][0]
    first, second = choice["message"]["tool_calls"]
    assert set(first) == {"id", "type", "function"}
    assert first["type"] == "function"
    assert first["id"].startswith("call_")
    assert first["id"] != second["id"]
    assert first["function"] == {"name": "look", "arguments": '{"count": 1}'}
    assert choice["message"]["content"] is None
    message, chunks = streamed(model.ask(tools=WIRE_TOOLS, stream=True, stream_options={"include_usage": True}))
    assert [call["function"] for call in message["tool_calls"]] == [first["function"], second["function"]]
    assert chunks[-1]["usage"]["completion_tokens"] == len(LOOK) * 2
    deltas = [one for chunk in chunks for choice in chunk["choices"] for one in choice["delta"].get("tool_calls", [])]
    assert [one["index"] for one in deltas] == [0, 0, 1, 1], "each comes once it is known to be valid"


def test_tools_and_history_reach_the_prompt_and_another_turn(speak: Speak) -> None:
    model = speak(templates.HERMES, "<think>Hm.</think>" + LOOK)
    answer = model.ask(USER, tools=WIRE_TOOLS).json()["choices"][0]["message"]
    assert "Does look." in model.prompt
    model.engine.answer = "It is 1."
    told = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "1"}
    found = model.ask(USER, answer, told, tools=WIRE_TOOLS).json()["choices"][0]
    assert found["finish_reason"] == "stop"
    assert found["message"]["content"] == "It is 1."
    prompt = model.prompt
    assert '<|assistant|><think>Hm.</think><tool_call>{"name": "look", "arguments": {"count": 1}}</tool_call>' in prompt
    assert "<tool_response>1</tool_response>" in prompt
    assert prompt.endswith("<|assistant|>")


def test_without_tools_a_call_is_text(speak: Speak) -> None:
    model = speak(templates.HERMES, LOOK)
    for more in ({}, {"tools": []}, {"tools": WIRE_TOOLS, "tool_choice": "none"}):
        choice = model.ask(**more).json()["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": LOOK, "refusal": None}
        assert choice["finish_reason"] == "stop"
        assert "Does look." not in model.prompt
        assert streamed(model.ask(stream=True, **more))[0]["content"] == LOOK


def test_a_call_that_is_cut_off(speak: Speak) -> None:
    model = speak(templates.HERMES, "So: " + LOOK)
    for most in range(1, len(LOOK) + 4):
        choice = model.ask(tools=WIRE_TOOLS, max_tokens=most).json()["choices"][0]
        has_call = "tool_calls" in choice["message"]
        # Its closing tag is no part of a call.
        assert has_call == (most >= len(("So: " + LOOK).removesuffix("}\n</tool_call>")))
        assert choice["finish_reason"] == "length"
        if not has_call:
            assert choice["message"]["content"] == ("So: " + LOOK)[:most]
        assert streamed(model.ask(tools=WIRE_TOOLS, max_tokens=most, stream=True))[0]["finish_reason"] == "length"


def test_a_call_that_is_wrong(speak: Speak) -> None:
    text = '<tool_call>{"name": "look", "arguments": {"count": oh}}</tool_call>'
    model = speak(templates.HERMES, text + LOOK)
    choice = model.ask(tools=WIRE_TOOLS).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "tool_calls")
    # Calls are numbered without those that are none.
    message, _ = streamed(model.ask(tools=WIRE_TOOLS, stream=True))
    assert (message["content"], message["finish_reason"]) == (text, "tool_calls")
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == ['{"count": 1}']


def test_one_call_at_most(speak: Speak) -> None:
    model = speak(templates.HERMES, LOOK * 3)
    choice = model.ask(tools=WIRE_TOOLS, parallel_tool_calls=False).json()["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    assert "</tool_call>" in model.engine.requests[-1].stop, "the answer ends there"
    message, _ = streamed(model.ask(tools=WIRE_TOOLS, parallel_tool_calls=False, stream=True))
    assert len(message["tool_calls"]) == 1
    assert len(model.ask(tools=WIRE_TOOLS, parallel_tool_calls=True).json()["choices"][0]["message"]["tool_calls"]) == 3


def test_several_answers_with_calls_and_logprobs(speak: Speak) -> None:
    model = speak(templates.HERMES, "Hm. " + LOOK)
    found = model.ask(tools=WIRE_TOOLS, n=2, logprobs=True).json()["choices"]
    assert [len(choice["message"]["tool_calls"]) for choice in found] == [1, 1]
    assert "".join(one["token"] for one in found[0]["logprobs"]["content"]) == "Hm. " + LOOK
    response = model.ask(tools=WIRE_TOOLS, n=2, logprobs=True, stream=True)
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        tokens = [entry["token"] for one in own for entry in (one["logprobs"] or {"content": []})["content"]]
        assert "".join(tokens) == "Hm. " + LOOK


def test_a_template_without_a_place_for_tools(speak: Speak) -> None:
    model = speak("{% for m in messages %}{{ m.content }}{% endfor %}", "Hello")
    error = model.ask(tools=WIRE_TOOLS).json()["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    told = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert model.ask(USER, told).json()["error"]["param"] == "messages"
    assert model.ask(tools=WIRE_TOOLS, tool_choice="none").status_code == 200


def test_tools_of_one_name_that_differ(speak: Speak) -> None:
    """Their calls would all go to one of them, without a word."""
    model = speak(templates.HERMES, LOOK)
    other = {"type": "function", "function": {**WIRE_TOOLS[0]["function"], "description": "Another."}}
    error = model.ask(tools=[*WIRE_TOOLS, other]).json()["error"]
    assert error["param"] == "tools"
    assert f"{other['function']['name']!r} differ" in error["message"]
    assert model.ask(tools=WIRE_TOOLS * 2).status_code == 200


def test_a_template_whose_format_is_not_known(speak: Speak) -> None:
    template = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    call = '{"name": "look", "parameters": {}}'
    error = speak(template, call).ask(tools=WIRE_TOOLS).json()["error"]
    assert error["code"] == "unsupported_parameter"
    assert "--tool-parser" in error["message"]
    told = speak(template, call, calls=format_named("llama")).ask(tools=WIRE_TOOLS).json()["choices"][0]["message"]
    assert told["tool_calls"][0]["function"]["name"] == "look"


@pytest.mark.parametrize("own", FORMATS, ids=[one.name for one in FORMATS])
def test_an_answer_without_calls(speak: Speak, own: Any) -> None:
    """As it is without tools, character by character, in every format."""
    answer = "  Dear all,\n\n{ } [x](y) <b>é漢😀</b> \n\n"
    model = speak(templates.HARMONY if own.has_channels else templates.HERMES, answer, own.markers, own)
    assert model.ask(tools=WIRE_TOOLS).json()["choices"][0]["message"]["content"] == answer
    assert streamed(model.ask(tools=WIRE_TOOLS, stream=True))[0]["content"] == answer


def test_the_same_tokenization_of_messages_with_tools(speak: Speak) -> None:
    model = speak(templates.HERMES, "Hello")
    model.ask(tools=WIRE_TOOLS)
    found = model.client.post("/tokenize", json={"messages": [USER], "tools": WIRE_TOOLS}).json()
    assert found["tokens"] == list(model.engine.requests[-1].prompt_ids)
