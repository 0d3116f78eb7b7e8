"""POST /v1/responses: items in and out, whole and streamed, the order of events, errors."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from foreroute.server.api.responses.schema import ResponsesRequest
from foreroute.server.dialogue.messages import Tool
from foreroute.server.dialogue.parsing.formats import format_named
from tests.server.dialogue import templates
from tests.server.dialogue.answers import TOOLS, VALID, Written
from tests.server.dialogue.conftest import Scripted

Speak = Callable[..., Scripted]
WIRE_TOOLS = [{"type": "function", "strict": False, **tool.definition} for tool in TOOLS.values()]
LOOK = '<tool_call>\n{"name": "look", "arguments": {"count": 1}}\n</tool_call>'
PATCH = '<tool_call>\n{"name": "patch", "arguments": {"input": "*** \\"a\\"\\n+b"}}\n</tool_call>'
CUSTOM = {
    "type": "custom", "name": "patch", "description": "Patches.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /a+/"},
}  # fmt: skip


def ask(model: Any, given: Any = "Hi", **more: Any) -> Any:
    return model.client.post("/v1/responses", json={"model": "model", "input": given, **more})


def events_of(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    events = []
    for written in response.text.strip().split("\n\n"):
        name, data = written.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


_TEXTS = {
    "message": ("response.output_text", "text"),
    "reasoning": ("response.reasoning_text", "text"),
    "function_call": ("response.function_call_arguments", "arguments"),
    "custom_tool_call": ("response.custom_tool_call_input", "input"),
}


def streamed(response: Any) -> dict[str, Any]:
    """The response at a stream's end; checks the order of the events before it, and that they add up to its items."""
    events = events_of(response)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{last['status']}"
    items: list[Any] = []
    item: Any = None
    said = ""
    steps: list[str] = []
    for event in events[2:-1]:
        kind = event["type"]
        assert event["output_index"] == len(items)
        if kind == "response.output_item.added":
            assert item is None
            item, said, steps = event["item"], "", []
            continue
        assert item is not None
        base, key = _TEXTS[item["type"]]
        if kind == "response.output_item.done":
            end = [f"{base}.done"]
            if item["type"] in ("message", "reasoning"):
                end = ["response.content_part.added", *end, "response.content_part.done"]
            assert steps == end
            whole = event["item"]
            assert (whole["content"][0] if key == "text" else whole)[key] == said
            items.append(whole)
            item = None
            continue
        assert event["item_id"] == item["id"]
        if kind == f"{base}.delta":
            said += event["delta"]
            continue
        steps.append(kind)
        if kind == f"{base}.done":
            assert event[key] == said
    assert item is None
    assert last["output"] == items
    return last


def both(model: Any, given: Any = "Hi", **more: Any) -> dict[str, Any]:
    """The answer, which is the same whole and streamed."""
    response = ask(model, given, **more)
    assert response.status_code == 200, response.text
    whole, parts = response.json(), streamed(ask(model, given, stream=True, **more))
    for one in (whole, parts):
        for name in ("id", "created_at", "completed_at"):
            one.pop(name)
        for item in one["output"]:
            assert item.pop("id")
            item.pop("call_id", None)
    assert parts == whole
    return whole


@pytest.mark.parametrize("written", VALID, ids=[f"{one.format}-{at}" for at, one in enumerate(VALID)])
def test_every_format_whole_and_streamed(speak: Speak, written: Written) -> None:
    own = format_named(written.format)
    model = speak(templates.HARMONY if own.has_channels else templates.HERMES, written.text, own.markers, own)
    output = both(model, tools=WIRE_TOOLS)["output"]
    said = {"message": "", "reasoning": ""}
    for item in output:
        if item["type"] in said:
            said[item["type"]] += item["content"][0]["text"]
    assert said == {"message": written.content, "reasoning": written.reasoning}
    calls = [(item["name"], item["arguments"]) for item in output if item["type"] == "function_call"]
    assert calls == list(written.calls)


def test_the_shape_of_an_answer(speak: Speak) -> None:
    model = speak(templates.HERMES, "<think>Hm.</think>I look." + LOOK)
    found = both(model, tools=WIRE_TOOLS, metadata={"a": "b"}, instructions="Be brief.")
    assert found["output"] == [
        {
            "type": "reasoning", "summary": [], "status": "completed",
            "content": [{"type": "reasoning_text", "text": "Hm."}],
        },
        {
            "type": "message", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "name": "look", "arguments": '{"count": 1}', "status": "completed"},
    ]  # fmt: skip
    prompt, new = len(model.engine.requests[-1].prompt_ids), len("<think>Hm.</think>I look." + LOOK)
    assert found["usage"] == {
        "input_tokens": prompt, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": new, "output_tokens_details": {"reasoning_tokens": len("<think>Hm.")},
        "total_tokens": prompt + new,
    }  # fmt: skip
    assert (found["status"], found["store"], found["metadata"]) == ("completed", False, {"a": "b"})
    assert model.prompt.startswith("<|system|>Be brief.")


def test_the_history_reaches_the_prompt(speak: Speak) -> None:
    model = speak(templates.HERMES, "It is 1.")
    text = lambda kind, said: [{"type": kind, "text": said, "annotations": []}]  # noqa: E731
    given = [
        {"type": "message", "role": "developer", "content": text("input_text", "And kind.")},
        {"role": "user", "content": text("input_text", "One")},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}],
         "encrypted_content": None, "status": "completed"},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": text("output_text", "I look.")},
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "look", "arguments": '{"count": 1}'},
        {"type": "custom_tool_call", "call_id": "call_2", "name": "patch", "input": "a\nb"},
        {"type": "function_call_output", "call_id": "call_1", "output": "1"},
        {"type": "custom_tool_call_output", "call_id": "call_2", "output": text("input_text", "Done.")},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "So."}]},
        {"type": "message", "role": "assistant", "content": "1."},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip
    hints = {
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "truncation": "disabled",
    }
    both(model, given, instructions="Be brief.", tools=[*WIRE_TOOLS, CUSTOM], **hints)
    prompt = model.prompt
    assert prompt.startswith("<|system|>Be brief.\nAnd kind.")
    assert "Patches.\\n\\nThe input is text of this lark grammar:\\nstart: /a+/" in prompt
    assert "<|user|>One<|assistant|><think>Hm.</think>I look.<tool_call>" in prompt
    assert '{"name": "patch", "arguments": {"input": "a\\nb"}}' in prompt
    assert "<tool_response>1</tool_response>" in prompt
    assert "<tool_response>Done.</tool_response><|assistant|><think>So.</think>1.<|user|>And?<|assistant|>" in prompt


def test_reasoning_in_a_message_is_no_text(speak: Speak) -> None:
    model = speak(templates.HERMES, "Hello")
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "output_text", "text": "One."}]
    given = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "?"},
    ]
    both(model, given, tools=[{**WIRE_TOOLS[0], "defer_loading": False, "output_schema": {}}])
    assert "<|assistant|><think>Hm.</think>One.<|user|>?" in model.prompt


def test_custom_tools(speak: Speak) -> None:
    model = speak(templates.HERMES, PATCH)
    (item,) = both(model, tools=[CUSTOM])["output"]
    assert item == {"type": "custom_tool_call", "name": "patch", "input": '*** "a"\n+b'}


def test_tools_in_a_namespace_and_hosted_ones(speak: Speak) -> None:
    """As Codex offers them. A call comes back with its namespace, and goes into the history with it."""
    call = '<tool_call>\n{"name": "agents__look", "arguments": {"count": 1}}\n</tool_call>'
    model = speak(templates.HERMES, call)
    tools = [{"type": "namespace", "name": "agents", "description": "x", "tools": [*WIRE_TOOLS, CUSTOM]}]
    (item,) = both(model, tools=[*tools, {"type": "web_search", "external_web_access": False}])["output"]
    assert (item["type"], item["name"], item["namespace"]) == ("function_call", "look", "agents")
    assert item["arguments"] == '{"count": 1}'
    assert "agents__patch" in model.prompt
    assert "web_search" not in model.prompt
    told = [
        {"role": "user", "content": "Hi"},
        {**item, "call_id": "a"},
        {"type": "function_call_output", "call_id": "a", "output": "5"},
    ]
    both(model, told, tools=tools)
    assert '"name": "agents__look", "arguments": {"count": 1}' in model.prompt
    model.engine.answer = PATCH.replace('"patch"', '"agents__patch"')
    (item,) = both(model, tools=tools)["output"]
    assert (item["type"], item["name"], item["namespace"]) == ("custom_tool_call", "patch", "agents")


def test_choices_of_tools(speak: Speak) -> None:
    model = speak(templates.HERMES, LOOK * 2)
    assert len(both(model, tools=WIRE_TOOLS)["output"]) == 2
    assert len(both(model, tools=WIRE_TOOLS, parallel_tool_calls=False)["output"]) == 1
    (item,) = both(model, tools=WIRE_TOOLS, tool_choice="none")["output"]
    assert item["content"][0]["text"] == LOOK * 2
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "write"}]}
    (item,) = both(model, tools=WIRE_TOOLS, tool_choice=allowed)["output"]
    assert item["type"] == "message"
    assert "Does look." not in model.prompt


NAMESPACE = {"type": "namespace", "name": "agents", "tools": [*WIRE_TOOLS, CUSTOM]}


@pytest.mark.parametrize(
    ("kind", "name", "call"),
    [("function", "look", LOOK.replace('"look"', '"agents__look"')),
     ("custom", "patch", PATCH.replace('"patch"', '"agents__patch"'))],
    ids=("function", "custom"),
)  # fmt: skip
def test_a_tool_in_a_namespace_is_chosen_or_allowed(speak: Speak, kind: str, name: str, call: str) -> None:
    model = speak(templates.HERMES, call)
    named = {"type": kind, "name": name, "namespace": "agents"}
    tools = [NAMESPACE, *WIRE_TOOLS]
    chosen = ResponsesRequest.model_validate({"input": "Hi", "tools": tools, "tool_choice": named}).dialogue().choice
    assert isinstance(chosen, Tool)
    assert chosen.name == f"agents__{name}"
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [named]}
    (item,) = both(model, tools=tools, tool_choice=allowed)["output"]
    assert (item["name"], item["namespace"]) == (name, "agents")
    assert "agents__write" not in model.prompt, "it was not among those that are allowed"
    for namespace in ("agent", 5):
        choice = {**named, "namespace": namespace}
        response = ask(model, tools=tools, tool_choice=choice)
        assert response.status_code == 400, "the namespace has no such tool, though there is one of that name"
        assert f"{namespace}__{name}" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ([NAMESPACE, {**CUSTOM, "name": "agents__look"}], ("'look' of the namespace 'agents' and custom 'agents__",)),
        ([CUSTOM, {"type": "function", "name": "patch"}], ("custom 'patch'", " and 'patch'")),
        ([WIRE_TOOLS[0], {**WIRE_TOOLS[0], "description": "Another."}], ("'write' and 'write'",)),
    ],
    ids=("joined", "custom", "twice"),
)  # fmt: skip
def test_tools_that_the_model_could_not_tell_apart(speak: Speak, tools: list[Any], said: tuple[str, ...]) -> None:
    response = ask(speak(templates.HERMES, "Hello"), tools=tools)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "tools"
    for words in said:
        assert words in response.json()["error"]["message"]


def test_the_same_tool_twice_is_one(speak: Speak) -> None:
    (item,) = both(speak(templates.HERMES, LOOK), tools=WIRE_TOOLS * 2)["output"]
    assert item["name"] == "look"


def test_an_answer_that_is_cut_off(speak: Speak) -> None:
    model = speak(templates.HERMES, "Hello")
    found = both(model, max_output_tokens=3)
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert found["output"][0]["status"] == "incomplete"
    model.engine.answer = "So: " + LOOK
    for most in range(1, len(LOOK) + 4):
        for stream in (False, True):
            response = ask(model, tools=WIRE_TOOLS, max_output_tokens=most, stream=stream)
            assert (streamed(response) if stream else response.json())["status"] == "incomplete"


def test_what_is_no_call_is_text(speak: Speak) -> None:
    """In a stream too: clients run a call that is done."""
    text = 'So: <tool_call>{"name": "look", "arguments": {"count": oh}}</tool_call>'
    model = speak(templates.HERMES, text)
    (item,) = both(model, tools=WIRE_TOOLS)["output"]
    assert (item["content"][0]["text"], item["status"]) == (text, "completed")
    model.engine.answer = "So: " + LOOK
    # Up to where the call is whole.
    for most in range(1, len("So: " + LOOK) - len("}\n</tool_call>")):
        found = both(model, tools=WIRE_TOOLS, max_output_tokens=most)
        assert [(item["type"], item["status"]) for item in found["output"]] == [("message", "incomplete")]
        assert found["output"][0]["content"][0]["text"].rstrip() == ("So: " + LOOK)[:most].rstrip()


def test_an_error_in_a_stream(speak: Speak) -> None:
    model = speak(templates.HERMES, "Hello")
    model.engine.error = "The disk is gone."
    last = events_of(ask(model, stream=True))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "The disk is gone."}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"unknown": 1}, "unknown"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input"),
        ({"input": [{"type": "function_call", "name": "a"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "messages"),
        ({"tools": [{"type": "file_search"}]}, "tools.0"),
        ({"tools": [{"type": ["function"]}]}, "tools.0"),
        ({"tools": [{"type": "namespace", "name": "a"}]}, "tools.0"),
        ({"tools": [{"type": "namespace", "name": "a", "tools": [{"type": "web_search"}]}]}, "tools.0.tools.0"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
        ({"tools": [{"type": "custom"}]}, "tools.0.name"),
        ({"tools": [{**CUSTOM, "defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tools": [{**WIRE_TOOLS[0], "defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tools": [{**WIRE_TOOLS[0], "allowed_callers": ["code"]}]}, "tools.0.allowed_callers"),
        ({"input": [{"role": "user", "content": [{"type": "thinking", "thinking": "Hm."}]}]}, "input"),
        ({"tools": WIRE_TOOLS, "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": WIRE_TOOLS,
                "tool_choice": {"type": "allowed_tools", "mode": [], "tools": [{"type": "function", "name": "look"}]},
            },
            "tool_choice",
        ),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
    ids=str,
)
def test_errors(speak: Speak, more: dict[str, Any], param: str) -> None:
    response = ask(speak(templates.HERMES, "Hello"), **more)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_effort_reaches_the_template(speak: Speak) -> None:
    model = speak("{% for m in messages %}{{ m.content }}{% endfor %}[{{ reasoning_effort }}]{# <think> #}", "Hello")
    both(model, reasoning={"effort": "low", "summary": "auto"})
    assert model.prompt.endswith("[low]")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metadata", '{"x": 1e999}'),
        ("tools", '[{"type": "function", "name": "look", "parameters": {"type": "object", "maximum": 1e999}}]'),
    ],
)
def test_numbers_that_json_cannot_say_again_are_refused(speak: Speak, name: str, value: str) -> None:
    response = speak(templates.HERMES, "Hello").client.post(
        "/v1/responses", content=f'{{"input": "Hi", "{name}": {value}}}', headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name
