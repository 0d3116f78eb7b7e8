"""Reasoning over the chat API: apart from content, and switched on and off by the names that clients know."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.dialogue import templates
from tests.server.dialogue.conftest import Scripted
from tests.server.dialogue.test_chat_tools import USER, streamed

Speak = Callable[..., Scripted]
PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "answer", "reasoning", "content"),
    [
        (templates.HERMES, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        (templates.HERMES, "Yes. <think>", "", "Yes. <think>"),
        # The template opens it: the answer has the end alone.
        (templates.QWEN3_CODER, "Hm.\n\nSo.\n</think>\n\nYes.\n", "Hm.\n\nSo.", "Yes.\n"),
        (templates.QWEN3_CODER, "Hm. And", "Hm. And", ""),
        (PLAIN + "{# [THINK] #}", "[THINK]Hm.[/THINK]Yes.", "Hm.", "Yes."),
        (PLAIN + "{# <|channel>thought #}", "<|channel>thought\nHm.\n<channel|>Yes.", "Hm.", "Yes."),
        # Nothing in the template says that it reasons: tags are text.
        (PLAIN, "<think>Hm.</think>Yes.", "", "<think>Hm.</think>Yes."),
    ],
)
@pytest.mark.parametrize("special", [(), ("<think>", "</think>", "[THINK]", "[/THINK]", "<|channel>")])
def test_reasoning_is_told_apart(
    speak: Speak, template: str, answer: str, reasoning: str, content: str, special: tuple[str, ...]
) -> None:
    if template == PLAIN and special:
        content = "Hm.Yes."  # special tokens are no text
    if answer.startswith("Yes.") and special:
        content = "Yes. <think>"
    model = speak(template, answer, special)
    message = model.ask().json()["choices"][0]["message"]
    assert message.get("reasoning_content", "") == reasoning
    assert message["content"] == content
    assert ("reasoning_content" in message) == bool(reasoning)
    found, chunks = streamed(model.ask(stream=True))
    assert (found["reasoning_content"], found["content"]) == (reasoning, content)
    assert found["finish_reason"] == "stop"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert len([delta for delta in deltas if "reasoning_content" in delta]) >= len(reasoning) - 4, "as it is written"


def test_harmonys_channels(speak: Speak) -> None:
    special = ("<|channel|>", "<|message|>", "<|return|>", "<|call|>", "<|start|>", "<|constrain|>")
    text = "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>final<|message|>46"
    model = speak(templates.HARMONY, text, special)
    message = model.ask().json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("think", "46")
    assert set(model.engine.requests[-1].stop) == {"<|call|>", "<|return|>"}
    # A special token that is no marker is still no text, as one that is is none in another format.
    assert "<|channel|>" in model.engine.requests[-1].shown_special
    assert "<|user|>" not in model.engine.requests[-1].shown_special
    plain = speak(PLAIN, text, special).ask().json()["choices"][0]["message"]
    assert plain["content"] == "analysisthinkassistantfinal46"


@pytest.mark.parametrize(
    ("asked", "is_on"),
    [
        ({"enable_thinking": False}, False),
        ({"enable_thinking": True}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024.0}}, True),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"reasoning": {"effort": "none"}}, False),
        ({"reasoning": {"enabled": False}}, False),
        ({"reasoning": None, "thinking": None, "reasoning_effort": None}, True),
        ({}, True),
    ],
)
def test_thinking_is_switched(speak: Speak, asked: dict[str, Any], is_on: bool) -> None:
    model = speak(templates.HERMES, "Yes.")
    assert model.ask(**asked).status_code == 200
    assert model.prompt.endswith("<|assistant|>" if is_on else "<think></think>")


def test_how_much_is_thought(speak: Speak) -> None:
    model = speak(templates.HARMONY, "Yes.")
    for asked, told in (
        ({}, "medium"),
        ({"reasoning_effort": "high"}, "high"),
        ({"reasoning": {"effort": "low"}}, "low"),
    ):
        assert model.ask(**asked).status_code == 200
        assert f"Reasoning: {told}" in model.prompt
    assert model.ask(chat_template_kwargs={"reasoning_effort": "low"}).status_code == 200
    assert "Reasoning: low" in model.prompt


@pytest.mark.parametrize("template", [templates.HARMONY, templates.QWEN3_CODER])
@pytest.mark.parametrize("asked", [{"reasoning_effort": "none"}, {"enable_thinking": False}])
def test_what_cannot_be_switched_off_is_said(speak: Speak, template: str, asked: dict[str, Any]) -> None:
    model = speak(template, "Yes.")
    error = model.ask(**asked).json()["error"]
    assert error["code"] == "unsupported_parameter"
    assert "always reasons" in error["message"]
    # A model that does not reason does not: there is nothing to switch off, and nothing to do more of.
    plain = speak(PLAIN, "Yes.")
    assert plain.ask(**asked).status_code == 200
    assert plain.ask(reasoning_effort="high").status_code == 200


def test_variables_for_the_template(speak: Speak) -> None:
    model = speak(PLAIN + "{{ flavour }}", "Yes.")
    assert model.ask(chat_template_kwargs={"flavour": "sour"}).status_code == 200
    assert model.prompt.endswith("sour")
    for name in ("taste", "messages", "add_generation_prompt"):
        error = model.ask(chat_template_kwargs={name: 1}).json()["error"]
        assert (error["param"], error["code"]) == ("chat_template_kwargs", "unsupported_parameter")


@pytest.mark.parametrize(
    "history",
    [
        {"reasoning_content": "Hm."},
        {"reasoning": "Hm."},
        {"thinking": "Hm."},
        {"thinking_blocks": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
                {"type": "text", "text": "Yes."},
            ]
        },
        {
            "reasoning": "Hm.",
            "reasoning_content": "Hm.",
            "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}],
        },
    ],
)
def test_reasoning_in_the_history(speak: Speak, history: dict[str, Any]) -> None:
    """What one turn gave comes back with the next, by the names of several servers."""
    model = speak(templates.HERMES, "Yes.")
    asked = model.ask(USER, {"role": "assistant", "content": "Yes.", **history}, USER)
    assert asked.status_code == 200, asked.text
    assert model.prompt == "<|user|>Hi<|assistant|><think>Hm.</think>Yes.<|user|>Hi<|assistant|>"
