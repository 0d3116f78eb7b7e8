"""JSON schemas of many kinds, by name, that structured output is tried with: here and in benchmarks/structured.py."""

from typing import Any

Schema = dict[str, Any]

_INT, _NUM, _STR, _BOOL, _NULL = ({"type": one} for one in ("integer", "number", "string", "boolean", "null"))
_SHORT: Schema = {"type": "string", "maxLength": 8}


def _object(required: int | None = None, /, *, closed: bool = True, **properties: Any) -> Schema:
    """An object; the first `required` of its properties must be there, or all of them."""
    found: Schema = {"type": "object", "properties": properties, "required": list(properties)[:required]}
    return {**found, "additionalProperties": False} if closed else found


def _array(items: Any, least: int = 0, most: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _strings() -> list[Schema]:
    lengths: list[Schema] = [
        {"type": "string", "minLength": least, "maxLength": most}
        for least, most in ((0, 0), (1, 1), (0, 5), (3, 3), (2, 10), (12, 20))
    ]
    patterns = (
        "^a+$", "^[a-z]{3}$", "^[A-Z][a-z]*$", "^\\d{4}-\\d{2}$", "^(yes|no)$", "^\\+?[0-9]{5,9}$", "^#[0-9a-f]{6}$",
        "^[^\"\\\\]{2,4}$", "^v\\d+\\.\\d+\\.\\d+$", "^(a|b)*c$", "^$", "^\\w{1,6}@\\w{1,6}\\.(com|org)$", "^x{0,3}y?$",
    )  # fmt: skip
    formats = ("date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname", "duration")
    return [
        *lengths,
        *({"type": "string", "pattern": one} for one in patterns),
        *({"type": "string", "format": one} for one in formats),
    ]


def _numbers() -> list[Schema]:
    whole = [
        {"minimum": 0}, {"maximum": 0}, {"minimum": -5, "maximum": 5}, {"exclusiveMinimum": 3},
        {"exclusiveMaximum": -3},
        {"minimum": 17, "maximum": 17}, {"minimum": 95, "maximum": 1203},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 2},
        {"multipleOf": 3}, {"multipleOf": 10, "minimum": 0}, {"minimum": -1000, "maximum": -990}, {},
    ]  # fmt: skip
    broken = [
        {"minimum": 0, "maximum": 1}, {"minimum": -0.5, "maximum": 0.25}, {"exclusiveMinimum": 0}, {"maximum": 1.5},
        {"minimum": 2.5}, {"exclusiveMinimum": 1, "exclusiveMaximum": 2}, {"minimum": 99.9, "maximum": 100.1}, {},
    ]  # fmt: skip
    return [*({"type": "integer", **one} for one in whole), *({"type": "number", **one} for one in broken)]


def _fixed() -> list[Schema]:
    values: list[Any] = [
        "a",
        "",
        'q"uote',
        "back\\slash",
        "new\nline",
        "é",
        "日本",
        "😀",
        1,
        -1,
        1.5,
        True,
        False,
        None,
    ]
    values += [[], [1, 2], {}, {"a": [1, {"b": None}]}]
    return [
        *({"const": one} for one in values),
        {"enum": values},
        {"enum": ["red", "green", "blue"]},
        {"enum": [1, 2, 3]},
        {"enum": [None, "none"]},
        {"type": "string", "enum": ["one", "only"]},
        {"enum": [f"item-{at}" for at in range(300)]},
    ]


def _arrays() -> list[Schema]:
    return [
        _array(_INT, 0, 0), _array(_INT, 1, 1), _array(_INT), _array(_BOOL, 2, 5), _array(_SHORT, 1, 2),
        _array(_array(_INT, 1, 2), 1, 2), _array({"enum": ["x", "y"]}, 3, 3), _array(_object(a=_INT), 1, 2),
        _array({"anyOf": [_INT, _BOOL]}, 1, 4), _array(_NULL, 0, 6), _array({"type": ["integer", "null"]}, 1, 3),
        {"type": "array", "prefixItems": [_INT, _BOOL], "items": False, "minItems": 2},
        {"type": "array", "prefixItems": [_SHORT], "items": _INT, "maxItems": 3},
        {"type": "array", "prefixItems": [_INT, _INT, _INT], "items": False, "minItems": 1},
        {"type": "array", "items": False}, {"type": "array", "items": {}, "maxItems": 1}, _array(_array(_array(_BOOL))),
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [_INT, _BOOL], "minItems": 2,
         "additionalItems": False},
    ]  # fmt: skip


def _objects() -> list[Schema]:
    names = ["name", "first name", "naïve", "日本語", 'a"b', "a\\b", "$ref", "x-y", "", "0", "\n", "type", "properties"]
    return [
        *(_object(**{one: _INT}) for one in names),
        _object(), _object(a=_INT), _object(1, a=_INT, b=_BOOL), _object(0, a=_INT, b=_BOOL),
        _object(a=_INT, b=_BOOL, c=_NULL),
        _object(2, a=_INT, b=_SHORT, c=_BOOL, d=_NULL), _object(a=_object(b=_object(c=_object(d=_INT)))),
        _object(a=_array(_object(b=_INT), 1, 2)), _object(1, a=_object(0, b=_INT), c=_INT),
        _object(0, **{f"p{at}": _INT for at in range(12)}),
        _object(**{f"p{at}": _BOOL for at in range(20)}), _object(a={"type": ["string", "null"], "maxLength": 4}),
        _object(a=_INT, closed=False), _object(0, a=_INT, closed=False), {"type": "object", "maxProperties": 2},
        {"type": "object", "minProperties": 1, "maxProperties": 2, "additionalProperties": _INT},
        {"type": "object", "additionalProperties": _BOOL}, {"type": "object", "additionalProperties": False},
        {"type": "object", "properties": {"a": _INT}, "additionalProperties": _BOOL},
        {"type": "object", "patternProperties": {"^n_[a-z]+$": _INT}, "additionalProperties": False},
        {"type": "object", "patternProperties": {"^n_": _INT, "^s_": _SHORT}, "additionalProperties": False},
        {"type": "object", "properties": {"a": _INT}, "required": ["a", "b"]}, {"type": "object", "required": ["z"]},
        {"properties": {"a": _INT}, "required": ["a"]}, {"type": "object", "properties": {"a": False, "b": _INT}},
    ]  # fmt: skip


def _mixed() -> list[Schema]:
    return [
        {"anyOf": [_INT, _SHORT]}, {"anyOf": [_object(a=_INT), _object(b=_INT)]}, {"anyOf": [_INT, _NULL]},
        {"anyOf": [{"const": 1}, {"const": "1"}, {"const": None}]}, {"oneOf": [_INT, _SHORT]},
        {"oneOf": [_BOOL, _NULL, _INT]},
        {"oneOf": [_object(kind={"const": "a"}, x=_INT), _object(kind={"const": "b"}, y=_BOOL)]},
        {"allOf": [_INT, {"minimum": 3}, {"maximum": 7}]},
        {"allOf": [{"type": "string", "maxLength": 5}, {"minLength": 2}]},
        {"allOf": [{"properties": {"a": _INT}, "required": ["a"]}, {"properties": {"b": _BOOL}, "required": ["b"]}]},
        {"type": ["integer", "string"], "maximum": 5, "minimum": 1, "maxLength": 2}, {"type": ["null", "boolean"]},
        {"type": ["array", "object"], "maxItems": 1, "maxProperties": 1, "items": _INT, "additionalProperties": _INT},
        {"type": "string", "maxLength": 3, "title": "T", "description": "D", "default": "d", "examples": ["e"]},
        {"anyOf": [{"type": "string", "format": "date"}, {"type": "string", "pattern": "^never$"}]},
        {"allOf": [{"anyOf": [_INT, _BOOL]}, {"anyOf": [_BOOL, _NULL]}]}, {}, {"type": "object"},
        {"anyOf": [_array(_INT, 1, 2), _array(_BOOL, 1, 2)]}, {"enum": [1, 2], "anyOf": [{"const": 2}, {"const": 3}]},
    ]  # fmt: skip


def _referring() -> list[Schema]:
    node = _object(1, value=_INT, next={"$ref": "#/$defs/node"})
    tree = _object(2, value=_INT, children=_array({"$ref": "#/$defs/tree"}, 0, 2))
    listed = {"anyOf": [_NULL, _object(head=_INT, tail={"$ref": "#/$defs/list"})]}
    expression = {"anyOf": [_INT, _object(op={"enum": ["+", "-"]}, left={"$ref": "#"}, right={"$ref": "#"})]}
    person = _object(
        2, name=_SHORT, age={"type": "integer", "minimum": 0, "maximum": 120}, email={"$ref": "#/definitions/mail"}
    )
    team = _object(lead={"$ref": "#/$defs/person"}, members=_array({"$ref": "#/$defs/person"}, 0, 2))
    return [
        {"$ref": "#/$defs/a", "$defs": {"a": _INT}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": _BOOL}},
        {"$ref": "#/$defs/node", "$defs": {"node": node}}, {"$ref": "#/$defs/tree", "$defs": {"tree": tree}},
        {"$ref": "#/$defs/list", "$defs": {"list": listed}}, expression,
        {**person, "definitions": {"mail": {"type": "string", "format": "email"}}},
        {**team, "$defs": {"person": _object(name=_SHORT, is_here=_BOOL)}},
        {"$defs": {"a/b": _INT}, "$ref": "#/$defs/a~1b"}, {"$defs": {"é ": _INT}, "$ref": "#/$defs/%C3%A9%20"},
        {"allOf": [{"$ref": "#/$defs/a"}, {"maximum": 9}], "$defs": {"a": {"type": "integer", "minimum": 0}}},
        {"$id": "https://example.com/s", "$ref": "#/$defs/a", "$defs": {"a": _INT}},
    ]  # fmt: skip


def _of_programs() -> list[Schema]:
    """As clients' libraries write them: a tool's arguments, an extraction, a plan."""
    place = _object(1, city={"type": "string", "maxLength": 12}, country={"enum": ["FR", "DE", "JP"]})
    unit = {"enum": ["celsius", "fahrenheit"], "default": "celsius", "description": "of the answer"}
    step = _object(explanation=_SHORT, output=_SHORT)
    return [
        _object(1, location={"type": "string", "maxLength": 10}, unit=unit),
        _object(steps=_array(step, 1, 2), final_answer=_SHORT),
        _object(path={"type": "string", "pattern": "^/[a-z/]{0,12}$"}, old_text=_SHORT, new_text=_SHORT),
        _object(1, command={"type": "string", "maxLength": 16},
            timeout_s={"type": "integer", "minimum": 1, "maximum": 600}),
        _object(1, query=_SHORT, limit={"type": "integer", "minimum": 1, "maximum": 50}, tags=_array(_SHORT, 0, 2)),
        _object(name={"const": "tool"}, arguments=place),
        _object(name={"enum": ["get", "set"]},
            arguments={"anyOf": [_object(key=_SHORT), _object(key=_SHORT, value=_INT)]}),
        _object(is_spam=_BOOL, confidence={"type": "number", "minimum": 0, "maximum": 1}),
        _object(answer={"enum": list("ABCD")}),
        _object(entities=_array(_object(text=_SHORT, label={"enum": ["PER", "LOC", "ORG"]}), 0, 3)),
        _object(date={"type": "string", "format": "date"}, amount=_NUM, currency={"enum": ["EUR", "USD"]}, paid=_BOOL),
        _object(sql={"type": "string", "maxLength": 20},
            parameters=_array({"type": ["string", "integer", "null"], "maxLength": 4})),
        _object(todos=_array(_object(content=_SHORT, status={"enum": ["pending", "done"]},
            id={"type": "string", "pattern": "^t[0-9]$"}), 1, 3)),
        _object(1, **{"from": place, "to": {"anyOf": [place, _NULL]}}),
        _object(x=_NUM, y=_NUM, z={"type": "number", "minimum": 0}),
    ]  # fmt: skip


def _nested_wide() -> list[Schema]:
    found = []
    for kind in (_INT, _BOOL, _SHORT, {"enum": ["a", 1, None]}, {"type": ["integer", "null"]}, _array(_INT, 1, 2)):
        for depth in (1, 2, 4):
            nested: Schema = kind
            for at in range(depth):
                nested = _object(**{f"k{at}": nested}) if at % 2 == 0 else _array(nested, 1, 2)
            found.append(nested)
        found += [
            _object(1, a=kind, b=kind),
            {"type": "object", "additionalProperties": kind, "maxProperties": 2},
            {"anyOf": [kind, _NULL]},
        ]
    return found


SCHEMAS: dict[str, Schema] = {
    f"{make.__name__.strip('_')}-{at}": schema
    for make in (_strings, _numbers, _fixed, _arrays, _objects, _mixed, _referring, _of_programs, _nested_wide)
    for at, schema in enumerate(make())
}
