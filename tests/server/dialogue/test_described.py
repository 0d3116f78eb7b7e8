"""Templates without a place for a system's message or for tools: neither is lost, and neither ends the conversation."""

from collections.abc import Callable
from typing import Any

import pytest

from foreroute.server.dialogue.parsing.formats import format_named
from tests.server.dialogue.conftest import Scripted
from tests.server.dialogue.test_chat_tools import LOOK, USER, WIRE_TOOLS

Speak = Callable[..., Scripted]
SYSTEM = {"role": "system", "content": "Be brief."}
PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
# As Gemma's and Mixtral's first: another role is refused, as is one twice.
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
)
SILENT = "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("template", [ALTERNATING, SILENT])
def test_a_systems_message_stands_before_the_question(speak: Speak, template: str) -> None:
    model = speak(template, "Yes.")
    assert model.ask(SYSTEM, {"role": "developer", "content": "Be kind."}, USER).status_code == 200
    assert model.prompt == "<|user|>Be brief.\n\nBe kind.\n\nHi"
    assert model.ask(SYSTEM).status_code == 200
    assert model.prompt == "<|user|>Be brief."
    assert model.ask(SYSTEM, {"role": "user", "content": [{"type": "text", "text": "a"}]}).status_code == 200
    assert model.prompt == "<|user|>Be brief.\n\na"


def test_a_template_with_a_place_is_given_it(speak: Speak) -> None:
    model = speak(PLAIN, "Yes.")
    assert model.ask(SYSTEM, USER).status_code == 200
    assert model.prompt == "<|system|>Be brief.<|user|>Hi"


@pytest.mark.parametrize("template", [PLAIN, ALTERNATING])
def test_tools_are_described_where_this_was_chosen(speak: Speak, template: str) -> None:
    model = speak(template, LOOK, calls=format_named("hermes"))
    message: dict[str, Any] = model.ask(SYSTEM, USER, tools=WIRE_TOOLS).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"count": 1}'}
    assert "Be brief.\n\n# Tools" in model.prompt
    assert '"description": "Does look."' in model.prompt
    model.engine.answer = "It is 1."
    answers = [{"role": "tool", "tool_call_id": "x", "content": text} for text in ("1", "2")]
    found = model.ask(SYSTEM, USER, message, *answers, tools=WIRE_TOOLS)
    assert found.json()["choices"][0]["message"]["content"] == "It is 1."
    assert model.prompt.endswith(
        f"<|assistant|>{LOOK}<|user|><tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    )
    assert model.ask(USER, tools=WIRE_TOOLS, tool_choice="none").status_code == 200
    assert model.prompt == "<|user|>Hi"
    # Another format is not one that a model without tools could know.
    assert speak(template, LOOK, calls=format_named("glm")).ask(tools=WIRE_TOOLS).status_code == 400
