"""Answers in every format: what is in them, however they are cut into pieces; what is no valid call stays text."""

import json
import random
import re
from collections.abc import Iterable

import pytest

from foreroute.errors import ServerError
from foreroute.server.dialogue.parsing.events import CallArguments, CallBegan, CallEnded, Event, ParsedAnswer
from foreroute.server.dialogue.parsing.formats import FORMATS, AnswerParser, format_named, format_of
from foreroute.server.dialogue.parsing.values import value_of
from foreroute.structured.reasoning import is_open
from tests.server.dialogue import templates
from tests.server.dialogue.answers import TEXT, TOOLS, VALID, Written

THINK = ("<think>", "</think>")
IDS = [f"{one.format}-{at}" for at, one in enumerate(VALID)]


def events_of(format_name: str, pieces: Iterable[str], **options: bool) -> list[Event]:
    own = format_named(format_name)
    parser = AnswerParser(own, TOOLS, None if own.has_channels else THINK, **options)
    return [*(event for piece in pieces for event in parser.push(piece)), *parser.finish()]


def said(events: Iterable[Event]) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    found = ParsedAnswer()
    found.add(events)
    return found.content, found.reasoning, tuple((call.name, call.arguments) for call in found.calls)


@pytest.mark.parametrize("written", VALID, ids=IDS)
def test_what_is_in_an_answer(written: Written) -> None:
    assert said(events_of(written.format, [written.text])) == (written.content, written.reasoning, written.calls)
    for _, arguments in written.calls:
        json.loads(arguments)


@pytest.mark.parametrize("written", VALID, ids=IDS)
def test_however_it_is_cut(written: Written) -> None:
    text = written.text
    whole = said(events_of(written.format, [text]))
    assert said(events_of(written.format, text)) == whole, "character by character"
    for at in range(1, len(text)):
        assert said(events_of(written.format, [text[:at], text[at:]])) == whole, at
    draw = random.Random(0)
    for _ in range(20):
        cuts = sorted(draw.choices(range(len(text)), k=8))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert said(events_of(written.format, pieces)) == whole, pieces


@pytest.mark.parametrize("written", VALID, ids=IDS)
def test_calls_come_in_order_and_arguments_as_they_are_written(written: Written) -> None:
    events = [
        one for one in events_of(written.format, written.text) if isinstance(one, CallBegan | CallArguments | CallEnded)
    ]
    for number, (name, arguments) in enumerate(written.calls):
        own = [one for one in events if one.index == number]
        assert isinstance(own[0], CallBegan)
        assert own[0].name == name
        assert own[-1] == CallEnded(number, True, "")
        pieces = [one.text for one in own if isinstance(one, CallArguments)]
        assert "".join(pieces) == arguments
        if len(arguments) > 30 and written.format not in ("pythonic", "gemma"):
            assert len(pieces) > 5, "they are not held back until they are whole"
    assert [one.index for one in events] == sorted(one.index for one in events)
    began = [one for one in events if isinstance(one, CallBegan)]
    assert len({one.id for one in began}) == len(began)


@pytest.mark.parametrize(("format_name", "text"), TEXT)
def test_what_is_no_call_stays_text(format_name: str, text: str) -> None:
    assert said(events_of(format_name, [text])) == (text, "", ())
    assert said(events_of(format_name, text)) == (text, "", ())


@pytest.mark.parametrize("written", VALID, ids=IDS)
def test_cut_off_anywhere(written: Written) -> None:
    """As by max_tokens: no error, the calls that are whole, and the same in one piece or many."""
    for end in range(len(written.text)):
        cut = written.text[:end]
        content, reasoning, calls = said(events_of(written.format, [cut]))
        assert said(events_of(written.format, cut)) == (content, reasoning, calls), end
        assert calls == written.calls[: len(calls)]
        # Cut off within the tag that ends it, that is part of it.
        assert written.reasoning.startswith(re.sub(r"<[/|\w]*$", "", reasoning).rstrip())


@pytest.mark.parametrize("format_name", [one.name for one in FORMATS])
def test_any_text_at_all(format_name: str) -> None:
    """Markers, brackets and words in any order: nothing raises, and in one piece or many it is the same."""
    draw = random.Random(1)
    own = format_named(format_name)
    parts = [
        *own.markers, *THINK, "look", "write", "{", "}", "[", "]", '"', ":", ",", "\\", " ", "\n", "é", "(", ")", "=",
        "to=",
        '{"name": "look", "arguments": {}}', "<function=look>", "</function>", "<parameter=text>", "</parameter>",
        '<invoke name="look">', "analysis", "final", "functions.look", "[1]", "null",
    ]  # fmt: skip
    for _ in range(300):
        text = "".join(draw.choices(parts, k=draw.randint(1, 12)))
        whole = events_of(format_name, [text])
        assert said(events_of(format_name, text)) == said(whole), text
        if not any(isinstance(one, CallBegan) for one in whole) and not own.has_channels and "think>" not in text:
            assert said(whole)[0] == text


def test_one_call_at_most() -> None:
    for written in VALID:
        for pieces in ([written.text], list(written.text)):
            assert said(events_of(written.format, pieces, one_call=True))[2] == written.calls[:1]


def test_reasoning_that_the_prompt_opened() -> None:
    for text, expected in (
        ("\nHm.\n</think>\n\nYes.", ("Yes.", "Hm.", ())),
        ("<think>\nHm.\n</think>\n\nYes.", ("Yes.", "Hm.", ())),
        ("Hm. And on", ("", "Hm. And on", ())),
        ("</think>Yes. <think>", ("Yes. <think>", "", ())),
    ):
        assert said(events_of("hermes", [text], is_open=True)) == expected
        assert said(events_of("hermes", text, is_open=True)) == expected
    assert is_open("<|assistant|><think>\n", THINK)
    assert not is_open("<|assistant|><think>\n\n</think>\n\n", THINK)
    # Within an answer, or without an end, tags are text and reasoning.
    assert said(events_of("hermes", ["I say <think> here."])) == ("I say <think> here.", "", ())
    assert said(events_of("hermes", ["<think>And on"])) == ("", "And on", ())


def test_a_call_that_turns_out_wrong_after_it_was_told() -> None:
    """A stream cannot take it back: what came is passed on as it was, and the whole answer has it as text."""
    text = '<tool_call>{"name": "look", "arguments": {"text": oh}}</tool_call>'
    events = events_of("hermes", text)
    assert "".join(one.text for one in events if isinstance(one, CallArguments)) == '{"text": oh}'
    assert events[-1] == CallEnded(0, False, text)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (templates.HERMES, "hermes"), (templates.QWEN3_CODER, "qwen3_coder"), (templates.DEEPSEEK, "deepseek"),
        (templates.MISTRAL, "mistral"), (templates.HARMONY, "harmony"), ("<minimax:tool_call>\n<invoke", "minimax"),
        ("<tool_call>{name}\n<arg_key>", "glm"), ("<|tool_calls_section_begin|>", "kimi"), ("{{ messages }}", None),
        ('Respond as {"name": function name, "parameters": dictionary}', "llama"), ("<tool_calls>[", "json_list"),
        ("<|tool_call_start|>", "pythonic"), ("<|tool_call>call:", "gemma"), ("<|tool_call|>", "granite"),
        ("<｜DSML｜function_calls>", "deepseek_dsml"),
    ],
)  # fmt: skip
def test_the_format_that_a_template_describes(template: str, name: str | None) -> None:
    found = format_of(template)
    assert (None if found is None else found.name) == name


def test_a_format_by_name() -> None:
    assert all(format_named(one.name) is one for one in FORMATS)
    with pytest.raises(ServerError, match="hermes"):
        format_named("none such")


@pytest.mark.parametrize(
    ("text", "schema", "expected"),
    [
        ("5", {"type": "string"}, "5"),
        ("5", {"type": "integer"}, 5),
        ("5.0", {"type": "integer"}, 5),
        ("5", {"type": "number"}, 5),
        ("five", {"type": "integer"}, "five"),
        ("true", {"type": "boolean"}, True),
        ("False", {"type": "boolean"}, False),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"type": "string", "nullable": True}, None),
        ("null", {"type": "string"}, "null"),
        ('{"a": 1}', {"type": "string"}, '{"a": 1}'),
        ('{"a": 1}', {"anyOf": [{"type": "string"}, {"type": "object"}]}, {"a": 1}),
        ('{"a": 1', {"type": "object"}, '{"a": 1'),
        ("[1]", {"$ref": "#/$defs/x"}, [1]),
        ("red", {"$ref": "#/$defs/x"}, "red"),
        ("5", {}, "5"),
        ("5", None, "5"),
        ("5", {"enum": [4, 5]}, 5),
        ("5", {"enum": ["4", "5"]}, "5"),
        ("NaN", {"type": "number"}, "NaN"),
        ("1e999", {"type": "number"}, "1e999"),
        ('["\\ud83d"]', {"type": "array"}, '["\\ud83d"]'),
        ('["\\ud83d\\ude00"]', {"type": "array"}, ["\U0001f600"]),
        ("[" * 5000, {"type": "array"}, "[" * 5000),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
    ],
)
def test_values_by_their_schema(text: str, schema: object, expected: object) -> None:
    found = value_of(text, schema)
    assert found == expected
    assert type(found) is type(expected)
