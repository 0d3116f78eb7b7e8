"""Calls whose arguments have tags: what their schemas say of texts and of references holds, or is refused by name."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")

from foreroute.errors import GrammarError
from foreroute.server.dialogue.enforced import form_of
from foreroute.structured import tagged
from foreroute.structured.compiler import GrammarCompiler
from foreroute.structured.tools import CallableTool, tool_calls

TEXT = {"type": "string"}
CITY = {"properties": {"city": TEXT}, "required": ["city"], "additionalProperties": False}


def grammar(parameters: Any, name: str = "qwen3_coder", **more: Any) -> Any:
    form = form_of(name)
    assert form is not None
    return tool_calls([CallableTool("look", parameters)], form.call, **more)


def call(*arguments: tuple[str, str]) -> str:
    written = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in arguments)
    return f"<tool_call>\n<function=look>\n{written}</function>\n</tool_call>"


def is_taken(compiler: GrammarCompiler, tokenizer: Any, told: Any, text: str) -> bool:
    mask = compiler.compile(told).start()
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not mask.allowed()[token]:
            return False
        mask.accept(token)
    return bool(mask.allowed()[0])


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({**TEXT, "minLength": 2, "maxLength": 4.0}, ["ab", "a\nbé"], ["", "a", "abcde"]),
        ({**TEXT, "pattern": "^[a-c]+$"}, ["ab"], ["", "abd", "ab\n"]),
        ({**TEXT, "pattern": "b/c"}, ["b/c", "a\nb/c d"], ["b c"]),
        ({**TEXT, "pattern": "^(ab|[$^]x)"}, ["ab", "$x and"], ["xab"]),
        ({**TEXT, "pattern": "b$", "minLength": 3}, ["aab"], ["ab", "aba"]),
        ({**TEXT, "format": "date"}, ["2026-11-30"], ["2026-13-01", "2026-11-31", "today"]),
        ({**TEXT, "format": "uuid"}, ["01234567-89ab-cdef-0123-456789abcdef"], ["0"]),
        ({"type": ["string"], "maxLength": 1}, ["", "a"], ["ab", '"a"']),
        ({"anyOf": [{**TEXT, "pattern": "^a+$"}, {"enum": ["no", "b"]}]}, ["aa", "no"], ["ab", "n"]),
        ({**TEXT, "description": "x", "examples": ["y"], "default": "z"}, ["", "x</p>"], ["x</parameter>y"]),
        ({"const": "5"}, ["5"], ["6", '"5"']),
        ({"$ref": "#/$defs/size"}, ["3"], ["12", "x"]),
        ({"type": ["string", "null"]}, ['"a"', "null"], ["a"]),
        ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 4}, ["2", "3"], ["1", "4", "2.5"]),
        ({"type": "integer", "multipleOf": 5}, ["0", "10"], ["7"]),
        ({"type": "boolean"}, ["true"], ["yes"]),
        ({"enum": [1, "a"]}, ["1", '"a"'], ["2", "a"]),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, ["[1]"], ["[]", "[1, 2, 3]"]),
        ({"type": "array", "prefixItems": [{"const": 1}], "items": False, "minItems": 1}, ["[1]"], ["[2]", "[1, 1]"]),
        (
            {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"], "additionalProperties": False},
            ['{"a": null}'], ["{}", '{"a": 1}', '{"a": null, "b": 1}'],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_values(compiler: Any, tokenizer: Any, schema: Any, good: list[str], bad: list[str]) -> None:
    told = {
        "type": "object", "properties": {"value": schema}, "required": ["value"],
        "$defs": {"size": {"type": "integer", "maximum": 9, "minimum": 0}},
    }  # fmt: skip
    made = grammar(told)
    assert [one for one in good if not is_taken(compiler, tokenizer, made, call(("value", one)))] == []
    assert [one for one in bad if is_taken(compiler, tokenizer, made, call(("value", one)))] == []


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", **CITY}}}, [call(("city", "Oslo"))], [call()]),
        (
            {"allOf": [{"properties": {"day": {"type": "integer"}}, "required": ["day"]},
                {"properties": {"city": TEXT}}]},
            [call(("day", "1")), call(("day", "1"), ("city", "a"))], [call(), call(("city", "a"))],
        ),
        ({"type": ["object"], **CITY}, [call(("city", "Oslo"))], [call()]),
        ({"type": "object", "additionalProperties": {"type": "integer"}},
         [call(), call(("a", "1"), ("b", "2"))], [call(("a", "x"))]),
        (None, [call(), call(("a", "1"), ("b", "two\nlines"))], ["Hello"]),
    ],
)  # fmt: skip
def test_all_arguments(compiler: Any, tokenizer: Any, parameters: Any, good: list[str], bad: list[str]) -> None:
    made = grammar(parameters)
    assert [one for one in good if not is_taken(compiler, tokenizer, made, one)] == []
    assert [one for one in bad if is_taken(compiler, tokenizer, made, one)] == []


@pytest.mark.parametrize("name", ["glm", "minimax", "qwen3_coder"])
def test_special_tokens_end_a_text(compiler: Any, name: str) -> None:
    """With any of the formats: what is compiled is for these tokens alone."""
    marks = {"<tool_call>": 1, "</arg_value>": 2, "</tool_call>": 3}
    told = {"type": "object", "properties": {"a": {**TEXT, "maxLength": 3}}, "required": ["a"]}
    assert compiler.compile(grammar(told, name, special=marks)).start().allowed().any()


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"properties": {"a": {**TEXT, "pattern": "a^b"}}}, '"pattern"'),
        ({"properties": {"a": {**TEXT, "pattern": "^a|b$"}}}, '"pattern"'),
        ({"properties": {"a": {**TEXT, "pattern": "(?=a)b"}}}, "look-around"),
        ({"properties": {"a": {**TEXT, "format": "colour"}}}, "'colour'"),
        ({"properties": {"a": {**TEXT, "not": {"const": "x"}}}}, '"not"'),
        ({"properties": {"a": {**TEXT, "allOf": [{"pattern": "x"}]}}}, '"allOf"'),
        ({"properties": {"a": {"oneOf": [TEXT, {**TEXT, "minLength": 1}]}}}, '"oneOf"'),
        ({"properties": {"a": {**TEXT, "minLength": 3, "maxLength": 2}}}, '"maxLength"'),
        ({"properties": {"a": {**TEXT, "minLength": -1}}}, '"minLength"'),
        ({"properties": {"a": {"type": "array", "items": {"$ref": "#"}}}}, r'"\$ref"'),
        ({"$ref": "#/$defs/none"}, r'"\$ref"'),
        ({"$ref": "#"}, r'"\$ref"'),
        ({"anyOf": [{"required": ["a"]}], "properties": {"a": TEXT}}, '"anyOf"'),
        ({"allOf": [{"not": {}}]}, '"not"'),
        (
            {"allOf": [{"properties": {"a": TEXT}, "additionalProperties": False}, {"properties": {"b": TEXT}}]},
            '"allOf"',
        ),
        ({"minProperties": 1, "properties": {"a": TEXT}}, '"minProperties"'),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_named(compiler: Any, parameters: Any, named: str) -> None:
    with pytest.raises(GrammarError, match=named):
        compiler.compile(grammar({"type": "object", **parameters}))


_TOGETHER: dict[str, Any] = {
    "anyOf": [{}], "oneOf": [{}], "not": {}, "if": {"required": ["a"]}, "enum": [{}], "const": {},
    "patternProperties": {"^a": {}}, "propertyNames": {"maxLength": 3}, "minProperties": 1, "maxProperties": 2,
    "dependentRequired": {"a": ["b"]}, "dependentSchemas": {"a": {"required": ["b"]}}, "dependencies": {"a": ["b"]},
    "$dynamicRef": "#a", "$recursiveRef": "#",
}  # fmt: skip


@pytest.mark.parametrize("keyword", _TOGETHER)
@pytest.mark.parametrize("name", ["qwen3_coder", "glm", "minimax"])
def test_what_would_hold_for_all_arguments_together_is_refused_by_name(name: str, keyword: str) -> None:
    with pytest.raises(GrammarError, match=f'"{re.escape(keyword)}", which cannot be enforced where each argument'):
        grammar({"type": "object", **CITY, keyword: _TOGETHER[keyword]}, name)


@pytest.mark.parametrize("keyword", ["$ref", "allOf", "anyOf", "oneOf", "not", "if"])
def test_what_combines_is_refused_beside_the_type_of_a_text(keyword: str) -> None:
    value = {**TEXT, keyword: "#/$defs/a" if keyword == "$ref" else [{"minLength": 1}]}
    with pytest.raises(GrammarError, match=f'"{re.escape(keyword)}", which cannot be enforced in a text'):
        grammar({"type": "object", "properties": {"value": value}})


def test_the_list_in_the_documentation_is_whole() -> None:
    told = (Path(__file__).parents[2] / "docs" / "api.md").read_text().partition("### In tagged calls")[2]
    assert [one for one in tagged._TOGETHER if f"`{one}`" not in told] == []
    assert set(tagged._TOGETHER) == set(_TOGETHER)
