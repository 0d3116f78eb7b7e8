"""Calls with a pair of tags for each argument: texts are written as they are, other values as JSON."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from foreroute.errors import GrammarError
from foreroute.structured.grammar import checked_schema
from foreroute.structured.lark import LarkWriter, quoted
from foreroute.structured.texts import text_form

# What would hold for all arguments together, while each is written by a rule of its own.
_TOGETHER = (
    "anyOf", "oneOf", "not", "if", "enum", "const", "patternProperties", "propertyNames", "minProperties",
    "maxProperties", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
_DEFINITIONS = ("$defs", "definitions")
_MOST_PARTS = 32


@dataclass(frozen=True)
class TaggedCall:
    """How a call in tags is written.

    `begin` NAME `between`, for each argument `key_begin` KEY `key_end` VALUE `value_end`, then `end`. Qwen3-Coder:
    '<tool_call>\\n<function=', '>\\n', ('<parameter=', '>\\n', '\\n</parameter>\\n'), '</function>\\n</tool_call>'.
    """

    begin: str
    between: str
    key_begin: str
    key_end: str
    value_end: str
    end: str


def tagged_rules(at: int, tool: str, schema: Mapping[str, Any] | None, form: TaggedCall, lark: LarkWriter) -> list[str]:
    """Return the rules of a call of `tool`; the first of them is call_{at}.

    Args:
        schema: of its arguments; None: any are taken.
    Raises:
        GrammarError: the schema has what cannot be enforced in this form; the keyword is named.
    """
    head, end = lark.text(form.begin + tool + form.between), lark.text(form.end)
    if schema is None:
        return [f"call_{at}: {head} free_{at}* {end}", *_free(at, form, lark.raw_until(form.value_end), lark)]
    whole = _put_together(tool, schema)
    properties, required, others = whole["properties"], whole["required"], whole["additionalProperties"]
    if any(name not in properties for name in required):
        raise GrammarError(f"The tool {tool!r} requires an argument that its properties do not have.")
    definitions = {name: schema[name] for name in _DEFINITIONS if name in schema}
    parts, rules = [], []
    for number, (name, value) in enumerate(properties.items()):
        written, more = _argument(f"{at}_{number}", value, definitions, form, lark, f"{name!r} of the tool {tool!r}")
        rules += [f"arg_{at}_{number}: {lark.text(form.key_begin + name + form.key_end)} {written}", *more]
        parts.append(f"arg_{at}_{number}" if name in required else f"arg_{at}_{number}?")
    # Beside names that are known, one of any name could be one of them again.
    if not properties and others is not None and others is not False:
        written, more = _argument(f"{at}_any", others, definitions, form, lark, f"of any name of the tool {tool!r}")
        rules += [*_free(at, form, written, lark), *more]
        parts.append(f"free_{at}*")
    return [f"call_{at}: {head} {' '.join(parts)} {end}", *rules]


def _free(at: int, form: TaggedCall, written: str, lark: LarkWriter) -> list[str]:
    """The rules of an argument of any name."""
    key = f"{lark.text(form.key_begin)} KEY_{at} {lark.text(form.key_end)}"
    return [f"free_{at}: {key} {written}", f'KEY_{at}: /[^<>"\\n]{{1,256}}/']


def _argument(
    name: str, value: Any, definitions: Mapping[str, Any], form: TaggedCall, lark: LarkWriter, place: str
) -> tuple[str, list[str]]:
    """What is written for a value and its end, and the rules for it; `name` is of this argument alone."""
    texts = _choices(value)
    if texts is not None:
        return f"value_{name} {lark.text(form.value_end)}", [f"value_{name}: {' | '.join(map(quoted, texts))}"]
    held = text_form(value, f"The argument {place}")
    if held is not None:
        return lark.raw_until(form.value_end, held), []
    schema = {**value, **definitions} if isinstance(value, Mapping) else value
    for reference in _references(schema):
        if not reference.startswith(tuple(f"#/{one}/" for one in _DEFINITIONS)):
            raise GrammarError(f'The argument {place} has "$ref" to {reference[:80]!r}: refer to $defs alone.')
    rule = f"value_{name}: %json {json.dumps(checked_schema(schema), ensure_ascii=False)}"
    return f"value_{name} {lark.text(form.value_end)}", [rule]


def _choices(value: Any) -> list[str] | None:
    """The texts of which a value is one; None: it is no choice among texts."""
    told = value.get("enum", [value["const"]] if "const" in value else None) if isinstance(value, Mapping) else None
    return told if isinstance(told, list) and told and all(isinstance(one, str) for one in told) else None


def _put_together(tool: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The properties and required names of a schema with those of what it refers to and of its parts (allOf)."""
    parts = list(_parts(tool, schema))
    properties: dict[str, Any] = {}
    required: list[str] = []
    for part in parts:
        found = next((one for one in _TOGETHER if one in part and (part[one] or one in ("not", "const"))), None)
        if found is not None:
            raise GrammarError(
                f'The parameters of the tool {tool!r} have "{found}", which cannot be enforced where each argument has '
                "its tags. Leave it out, and check the arguments yourself."
            )
        own, names = part.get("properties", {}), part.get("required") or []
        if not isinstance(own, Mapping) or not _are_texts(names):
            raise GrammarError(f"The tool {tool!r} requires an argument that its properties do not have.")
        for name, value in own.items():
            properties[name] = {"allOf": [properties[name], value]} if properties.get(name, value) != value else value
        required += names
    for part in parts:
        if part.get("additionalProperties") is False and properties.keys() - part.get("properties", {}).keys():
            raise GrammarError(
                f'The parameters of the tool {tool!r} have "allOf" with parts of which one refuses what another has.'
            )
    others = next((part["additionalProperties"] for part in parts if "additionalProperties" in part), None)
    return {"properties": properties, "required": required, "additionalProperties": others}


def _are_texts(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _parts(tool: str, schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    waiting: list[Any] = [schema]
    for _ in range(_MOST_PARTS):
        if not waiting:
            return
        part = waiting.pop(0)
        if not isinstance(part, Mapping) or part.get("type", "object") != "object":
            raise GrammarError(f"The parameters of the tool {tool!r} are no object's schema.")
        yield part
        if "$ref" in part:
            waiting.append(_referred(schema, part["$ref"], tool))
        waiting += part["allOf"] if isinstance(part.get("allOf"), list) else []
    raise GrammarError(f'The parameters of the tool {tool!r} have "$ref" and "allOf" of more than {_MOST_PARTS} parts.')


def _referred(schema: Mapping[str, Any], reference: Any, tool: str) -> Any:
    found: Any = schema
    names = reference.split("/") if isinstance(reference, str) else [""]
    for name in names[1:]:
        found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    if names[0] != "#" or found is None:
        raise GrammarError(
            f'The parameters of the tool {tool!r} have "$ref" to {str(reference)[:80]!r}, which is none.'
        )
    return found


def _references(schema: Any) -> Iterator[str]:
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            if isinstance(one.get("$ref"), str):
                yield one["$ref"]
            waiting += one.values()
        elif isinstance(one, (list, tuple)):
            waiting += one
