"""What a chat template reads: content as text or parts, arguments as text or object, ids, one call or several."""

from typing import Any

import pytest

from foreroute.server.dialogue.messages import Dialogue, DialogueMessage, Thinking, Tool, ToolCall
from foreroute.server.dialogue.reading import TemplateReading
from foreroute.server.dialogue.rendering import TemplateError, template_input
from foreroute.server.dialogue.template_worker import read, render
from tests.server.dialogue import templates

PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
SETTINGS = {"variables": {}, "most_chars": 10**6, "most_s": 5}
TOOL = Tool("look", {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}})


def reading_of(template: str) -> TemplateReading:
    return TemplateReading.from_json(read({"template": template, **SETTINGS})["reading"])


def rendered(template: str, conversation: Dialogue) -> str:
    given = template_input(conversation, template, reading_of(template))
    found = render(
        {
            "template": template,
            "messages": given.messages,
            "tools": given.tools,
            **SETTINGS,
            "variables": given.variables,
        }
    )
    assert "error" not in found, found
    return found["text"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, TemplateReading()),
        (templates.EITHER, TemplateReading()),
        (templates.PARTS, TemplateReading(in_parts=("system", "user", "assistant"))),
        (templates.FIRST_PART, TemplateReading(in_parts=("system", "user", "assistant"))),
        (templates.MAPPED, TemplateReading(in_parts=("system", "user", "assistant"))),
        (templates.HERMES, TemplateReading(has_tools=True)),
        (templates.QWEN3_CODER, TemplateReading(has_tools=True)),
        (templates.DEEPSEEK, TemplateReading(has_tools=True, text_arguments=True, empty_is_none=True)),
        (templates.MISTRAL, TemplateReading(in_parts=("system",), has_tools=True, short_ids=True)),
        (templates.HARMONY, TemplateReading(has_tools=True, one_call=True)),
    ],
    ids=["plain", "either", "parts", "first", "mapped", "hermes", "coder", "deepseek", "mistral", "harmony"],
)
def test_what_a_template_reads(template: str, expected: TemplateReading) -> None:
    found = reading_of(template)
    assert {**found.as_json(), "names": ()} == {**expected.as_json(), "names": ()}


@pytest.mark.parametrize("template", [PLAIN, *(getattr(templates, name) for name in ("PARTS", "FIRST_PART", "MAPPED"))])
def test_every_text_reaches_the_prompt(template: str) -> None:
    talk = [("system", "Be brief."), ("user", "one\ntwo"), ("assistant", "three"), ("user", "four")]
    said = rendered(template, Dialogue(tuple(DialogueMessage(role, text) for role, text in talk)))
    assert said == "".join(f"<|{role}|>{text}" for role, text in talk)


def called(*calls: ToolCall) -> Dialogue:
    answers = (DialogueMessage("tool", f"answer to {call.id}", call_id=call.id) for call in calls)
    asked = (DialogueMessage("user", "Look."), DialogueMessage("assistant", None, "I should look.", calls), *answers)
    return Dialogue(asked, (TOOL,))


FIRST, SECOND = ToolCall("call_1", "look", '{"at": "é"}'), ToolCall("call_2", "look", '{"at": "here"}')


@pytest.mark.parametrize("name", ["HERMES", "QWEN3_CODER", "DEEPSEEK", "MISTRAL", "HARMONY"])
def test_calls_and_their_answers_reach_the_prompt(name: str) -> None:
    said = rendered(getattr(templates, name), called(FIRST, SECOND))
    for text in ("Look.", "look", "here", "é", "answer to call_1", "answer to call_2"):
        assert text in said, (text, said)
    assert "None" not in said
    assert '\\"at' not in said
    assert "{'at" not in said


def test_a_template_that_shows_one_call_is_given_them_one_by_one() -> None:
    """gpt-oss's shows the first of a message's calls, without a word about the others."""
    said = rendered(templates.HARMONY, called(FIRST, SECOND))
    order = [said.index(text) for text in ("I should look.", "é", "answer to call_1", "here", "answer to call_2")]
    assert order == sorted(order)
    assert said.count("I should look.") == 1


def test_reasoning_goes_back_under_the_templates_own_name() -> None:
    talk = (DialogueMessage("user", "Hi"), DialogueMessage("assistant", "Yes.", "Hm."), DialogueMessage("user", "So?"))
    assert "<think>Hm.</think>Yes." in rendered(templates.HERMES, Dialogue(talk))
    # Reasoning and content beside a call: the template refuses both, and neither may be lost.
    both = (
        DialogueMessage("user", "Hi"),
        DialogueMessage("assistant", "I look.", "Hm.", (FIRST,)),
        DialogueMessage("tool", "5", call_id="call_1"),
    )
    said = rendered(templates.HARMONY, Dialogue(both, (TOOL,)))
    assert "Hm." in said
    assert "I look." in said


@pytest.mark.parametrize("arguments", ['{"at": }', "[1]", "5", "", "x" * 50])
@pytest.mark.parametrize("name", ["HERMES", "QWEN3_CODER", "DEEPSEEK", "MISTRAL", "HARMONY"])
def test_a_call_that_was_wrong_does_not_end_the_conversation(name: str, arguments: str) -> None:
    said = rendered(getattr(templates, name), called(ToolCall("call_1", "look", arguments)))
    assert "answer to call_1" in said


def test_short_ids_stay_the_same_for_a_call_and_its_answer() -> None:
    given = template_input(called(FIRST, SECOND), templates.MISTRAL, reading_of(templates.MISTRAL))
    calls = given.messages[1]["tool_calls"]
    answers = [message["tool_call_id"] for message in given.messages if message["role"] == "tool"]
    assert [call["id"] for call in calls] == answers
    assert len(set(answers)) == 2
    assert all(len(one) == 9 for one in answers)


@pytest.mark.parametrize(
    ("template", "thinking", "expected"),
    [
        (templates.HERMES, Thinking(is_on=False), {"enable_thinking": False}),
        (templates.HERMES, Thinking(effort="none"), {"enable_thinking": False}),
        (templates.HERMES, Thinking(effort="low"), {"enable_thinking": True}),
        (templates.HERMES, Thinking(), {}),
        (templates.HARMONY, Thinking(effort="low"), {"reasoning_effort": "low"}),
        (templates.HARMONY, Thinking(effort="minimal"), {"reasoning_effort": "low"}),
        (templates.HARMONY, Thinking(effort="xhigh"), {"reasoning_effort": "high"}),
        (PLAIN, Thinking(effort="high"), {}),
        # DeepSeek-V3.1's name for it; a message's field of this name is no switch.
        ("{% if thinking %}<think>{% endif %}", Thinking(is_on=True), {"thinking": True}),
        ("{{ messages[0].thinking }}{# thinking #}", Thinking(is_on=True), {}),
    ],
)
def test_how_a_template_is_told_to_think(template: str, thinking: Thinking, expected: dict[str, Any]) -> None:
    conversation = Dialogue((DialogueMessage("user", "Hi"),), thinking=thinking)
    assert template_input(conversation, template, reading_of(template)).variables == expected


@pytest.mark.parametrize(
    ("variables", "field"),
    [
        ({"unknown": 1}, "chat_template_kwargs"),
        ({"messages": []}, "chat_template_kwargs"),
        ({"tools": []}, "chat_template_kwargs"),
        ({"raise_exception": 1}, "chat_template_kwargs"),
        ({"__class__": 1}, "chat_template_kwargs"),
        ({"bos_token": "x"}, "chat_template_kwargs"),
        ({"a b": 1}, "chat_template_kwargs"),
    ],
)
def test_variables_that_a_template_may_not_be_given(variables: dict[str, Any], field: str) -> None:
    template = PLAIN + "{{ bos_token }}{{ own }}"
    with pytest.raises(TemplateError) as caught:
        template_input(Dialogue((), variables=variables), template, reading_of(template))
    assert caught.value.field == field
    own = Dialogue((), variables={"own": "x", "enable_thinking": False})
    assert template_input(own, template, reading_of(template)).variables == {"own": "x"}


def test_tools_need_a_place() -> None:
    for conversation, field in ((Dialogue((), (TOOL,)), "tools"), (called(FIRST), "tools")):
        with pytest.raises(TemplateError) as caught:
            template_input(conversation, PLAIN, reading_of(PLAIN))
        assert caught.value.field == field
    given = template_input(Dialogue((), (TOOL,), choice="none"), PLAIN, reading_of(PLAIN))
    assert given.tools is None


def test_a_template_that_cannot_be_parsed() -> None:
    assert "TemplateSyntaxError" in read({"template": "{% for %}", **SETTINGS})["error"]
