"""Values that a model wrote as text, by the JSON schema of their parameter."""

from typing import Any

from foreroute.server.dialogue.parsing.json_text import strict_json

_WORDS = {"True": True, "False": False, "None": None}
_DEEPEST = 8


def is_text(schema: Any) -> bool:
    """Whether a value can be nothing but text."""
    return types_of(schema) == {"string"}


def types_of(schema: Any, depth: int = 0) -> set[str]:
    """The types that a schema allows; "any" where it does not say."""
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return {"any"}
    found = _told_by(schema, depth)
    if schema.get("nullable") is True:
        found.add("null")
    return found or {"any"}


def _told_by(schema: dict[str, Any], depth: int) -> set[str]:
    """The types by the first keyword that says any."""
    told, several = schema.get("type"), schema.get("anyOf") or schema.get("oneOf")
    if told is not None:
        return {one for one in (told if isinstance(told, list) else [told]) if isinstance(one, str)}
    if isinstance(several, list):
        return {kind for one in several for kind in types_of(one, depth + 1)}
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if isinstance(values, list) and values:
        return {_type_of(one) for one in values}
    return {"any", "object", "array", "number", "boolean"} if "$ref" in schema else set()


def value_of(text: str, schema: Any) -> Any:
    """The value that `text` stands for: JSON where the schema allows its type, else the text as it is."""
    allowed = types_of(schema)
    try:
        value = _WORDS[text.strip()] if text.strip() in _WORDS else strict_json(text)
    except (ValueError, RecursionError):
        return text
    kind = _type_of(value)
    if kind in allowed or (kind == "integer" and "number" in allowed):
        return value
    if allowed & {"string", "any"}:
        return text
    # Whole where it must be: 5.0. Else of a type that is not allowed: told as it was written, for the tool to refuse.
    return int(value) if isinstance(value, float) and value.is_integer() and "integer" in allowed else value


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "object"
