"""A stream says of an answer what the whole answer says, in all three APIs: of broken calls and cut ones too."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from foreroute.server.dialogue.parsing.formats import format_named
from tests.server.dialogue import templates
from tests.server.dialogue.answers import TEXT, VALID
from tests.server.dialogue.conftest import Scripted
from tests.server.dialogue.test_chat_tools import WIRE_TOOLS, streamed
from tests.server.messages import test_messages as messages
from tests.server.responses import test_responses as responses

Speak = Callable[..., Scripted]
SCHEMA = {"type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"]}
LOOK = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
CALL = '<tool_call>\n{"name": "look", "arguments": {"count": 12}}\n</tool_call>'


def speaking(speak: Speak, name: str, text: str) -> Scripted:
    own = format_named(name)
    return speak(templates.HARMONY if own.has_channels else templates.HERMES, text, own.markers, own)


def chat(model: Scripted, **more: Any) -> dict[str, Any]:
    """The answer, which is the same whole and streamed: text, calls, why it ended."""
    more = {"tools": WIRE_TOOLS, **more}
    response = model.ask(**more)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    whole = {**choice["message"], "finish_reason": choice["finish_reason"]}
    whole["content"] = whole["content"] or ""
    told, _ = streamed(model.ask(stream=True, **more))
    for name in ("content", "reasoning_content", "finish_reason"):
        assert told[name] == whole.get(name, ""), name
    functions = [[call["function"] for call in one.get("tool_calls", [])] for one in (whole, told)]
    assert functions[0] == functions[1]
    return whole


@pytest.mark.parametrize(("name", "text"), TEXT)
def test_what_is_no_call(speak: Speak, name: str, text: str) -> None:
    model = speaking(speak, name, text)
    assert chat(model)["content"] == text
    assert "tool_calls" not in chat(model)
    responses.both(model, tools=responses.WIRE_TOOLS)
    messages.both(model, tools=messages.WIRE_TOOLS)


@pytest.mark.parametrize("written", VALID, ids=[f"{one.format}-{at}" for at, one in enumerate(VALID)])
def test_what_is_cut_off(speak: Speak, written: Any) -> None:
    model = speaking(speak, written.format, written.text)
    num_tokens = len(model.tokenizer(written.text, add_special_tokens=False)["input_ids"])
    for most in range(1, num_tokens + 1, 17):
        found = chat(model, max_tokens=most)
        for call in found.get("tool_calls", []):
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
        responses.both(model, tools=responses.WIRE_TOOLS, max_output_tokens=most)
        messages.both(model, tools=messages.WIRE_TOOLS, max_tokens=most)


def test_nothing_of_a_call_is_sent_before_it_is_known_to_be_one(speak: Speak) -> None:
    text = '<tool_call>{"name": "look", "arguments": {"count": oh}}</tool_call>'
    model = speak(templates.HERMES, text)
    _, chunks = streamed(model.ask(tools=WIRE_TOOLS, stream=True))
    assert not any("tool_calls" in choice["delta"] for chunk in chunks for choice in chunk["choices"])


def test_a_call_that_must_be_comes_as_it_is_written(speak: Speak) -> None:
    """A grammar holds it to its form: only the answer's end can break it, and then it is a call that is not whole."""
    pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")
    from foreroute.structured.compiler import GrammarCompiler

    model = speak(templates.HERMES, CALL)
    model.backend.serving().grammars = GrammarCompiler(model.tokenizer, len(model.tokenizer), [1])
    asked = {"tools": LOOK, "tool_choice": "required"}
    _, chunks = streamed(model.ask(stream=True, **asked))
    assert sum("tool_calls" in choice["delta"] for chunk in chunks for choice in chunk["choices"]) > 8
    most = CALL.index("12") + 1
    found = chat(model, **asked, max_tokens=most)
    assert [call["function"]["arguments"] for call in found["tool_calls"]] == ['{"count": 1']
    assert (found["content"], found["finish_reason"]) == ("", "length")
    # Before its name is known there is no call.
    assert chat(model, **asked, max_tokens=20)["content"] == CALL[:20]
    # The other APIs have no place for half a call.
    tools = [{"type": "function", "name": "look", "parameters": SCHEMA}]
    told = responses.both(model, tools=tools, tool_choice="required", max_output_tokens=most)
    assert told["output"][0]["content"][0]["text"] == CALL[:most]
    blocks = [{"name": "look", "input_schema": SCHEMA}]
    (block,) = messages.both(model, tools=blocks, tool_choice={"type": "any"}, max_tokens=most)["content"]
    assert block == {"type": "text", "text": CALL[:most]}
