"""Tool calls in the forms of several models: what a grammar of them takes, and what it does not."""

from typing import Any

import pytest

pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")

from foreroute.errors import GrammarError
from foreroute.structured.tagged import TaggedCall
from foreroute.structured.tools import CallableTool, JsonCall, tool_calls

WEATHER = CallableTool(
    "weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "maximum": 9},
            "unit": {"enum": ["C", "F"]},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
)
NOW, QUOTED = CallableTool("now"), CallableTool('say"so')
HERMES = JsonCall('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")
MISTRAL = JsonCall('{"name": "', '", "arguments": ', "}")
# With special tokens of the small model in the places of gpt-oss's.
HARMONY = JsonCall("<|assistant|>to=functions.", "<|user|>", "<|system|>")
SPECIAL = {"<|user|>": 1, "<|assistant|>": 2, "<|system|>": 3}
CODER = TaggedCall(
    "<tool_call>\n<function=", ">\n", "<parameter=", ">\n", "\n</parameter>\n", "</function>\n</tool_call>"
)


@pytest.mark.parametrize(
    ("form", "options", "good", "bad"),
    [
        (
            HERMES,
            {"most": 2, "separator": "\n"},
            [
                '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "unit": "C"}}\n</tool_call>',
                '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
                '<tool_call>\n{"name": "say\\"so", "arguments": {}}\n</tool_call>',
            ],
            [
                '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>',
                '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
                "Hello",
            ],
        ),
        (
            MISTRAL,
            {"opening": "[TOOL_CALLS][", "separator": ", ", "closing": "]", "most": 3},
            ['[TOOL_CALLS][{"name": "now", "arguments": {}}]',
             '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "weather", "arguments": {"city": "é"}}]'],
            ["[TOOL_CALLS][]", '{"name": "now", "arguments": {}}'],
        ),
        (
            HARMONY,
            {"special": SPECIAL},
            ['<|assistant|>to=functions.weather<|user|>{"city": "x"}<|system|>'],
            ['<|assistant|>to=functions.weather{"city": "x"}<|system|>'],
        ),
        (
            CODER,
            {},
            [
                "<tool_call>\n<function=weather>\n<parameter=city>\nNew\n\"York\" </p>\n</parameter>\n"
                "</function>\n</tool_call>",
                "<tool_call>\n<function=weather>\n<parameter=city>\n\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
                "<parameter=unit>\nF\n</parameter>\n</function>\n</tool_call>",
                "<tool_call>\n<function=now>\n</function>\n</tool_call>",
            ],
            [
                "<tool_call>\n<function=weather>\n</function>\n</tool_call>",
                "<tool_call>\n<function=weather>\n<parameter=city>\na\n</parameter>\n<parameter=days>\n30\n</parameter>\n"
                "</function>\n</tool_call>",
                "<tool_call>\n<function=weather>\n<parameter=city>\na\n</parameter>\n<parameter=unit>\n\"F\"\n</parameter>\n"
                "</function>\n</tool_call>",
            ],
        ),
        (HERMES, {"is_required": False},
         ["Hello there", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'], []),
    ],
    ids=["hermes", "mistral", "special-tokens", "tags", "auto"],
)  # fmt: skip
def test_forms(compiler: Any, tokenizer: Any, form: Any, options: Any, good: list[str], bad: list[str]) -> None:
    grammar = compiler.compile(tool_calls([WEATHER, NOW, QUOTED], form, **options))

    def is_taken(text: str) -> bool:
        mask = grammar.start()
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            if not mask.allowed()[token]:
                return False
            mask.accept(token)
        return bool(mask.allowed()[0])

    assert [text for text in good if not is_taken(text)] == []
    assert [text for text in bad if is_taken(text)] == []


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([], "no tool"),
        ([NOW, NOW], "'now' occurs twice"),
        ([CallableTool("x", {"type": "string"})], "no object's schema"),
        ([CallableTool("x", {"type": "object", "required": ["y"]})], "requires an argument"),
        ([CallableTool("x", {"type": "object", "required": True})], "requires an argument"),
        ([CallableTool("x", {"type": "object", "required": [["y"]]})], "requires an argument"),
    ],
)
def test_tools_that_cannot_be_called(tools: list[CallableTool], message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        tool_calls(tools, CODER)


def test_required_may_be_null() -> None:
    """As programs write an empty list that was never made."""
    told = CallableTool("x", {"type": "object", "properties": {"y": {"type": "string"}}, "required": None})
    bare = CallableTool("x", {"type": "object", "properties": {"y": {"type": "string"}}})
    assert tool_calls([told], CODER) == tool_calls([bare], CODER)
