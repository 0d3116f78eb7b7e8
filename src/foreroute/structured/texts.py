"""Which texts a JSON schema allows, as a terminal of a grammar: where a text is written without quotes."""

from collections.abc import Mapping
from typing import Any

from foreroute.errors import GrammarError
from foreroute.structured.lark import ANY, quoted, regex

# What combines schemas: a text by two of them is not one terminal.
_COMBINING = ("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not", "if")
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_DATE = (
    r"[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|"
    r"02-(0[1-9]|1[0-9]|2[0-8]))"
)
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "email": rf"[A-Za-z0-9_%+-]+(\.[A-Za-z0-9_%+-]+)*@{_LABEL}(\.{_LABEL})+",
    "hostname": rf"{_LABEL}(\.{_LABEL})*",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:[A-Za-z0-9._~:/?#@!$&'()*+,;=%-]+",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}
_ADVICE = "Leave it out, and check the argument yourself."


def text_form(schema: Any, place: str) -> str | None:
    """Return the terminal's expression of the texts that a schema allows; None: it allows other values, or may.

    Args:
        place: whose schema it is, for errors.
    Raises:
        GrammarError: it allows texts alone, and says something of them that cannot be enforced.
    """
    if not isinstance(schema, Mapping) or schema.get("nullable") is True:
        return None
    told = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(told, list) and told and all(isinstance(one, str) for one in told):
        return " | ".join(map(quoted, told))
    if schema.get("type") in ("string", ["string"]):
        return _string(schema, place)
    return None if "type" in schema else _one_of_several(schema, place)


def _one_of_several(schema: Mapping[str, Any], place: str) -> str | None:
    """The same for a schema of several, by "anyOf" or "oneOf"."""
    for name in ("anyOf", "oneOf"):
        found = schema.get(name)
        several: list[Any] = found if isinstance(found, list) else []
        forms = [text_form(one, place) for one in several]
        if not forms or None in forms:
            continue
        if name == "oneOf" and not all("enum" in one or "const" in one for one in several):
            raise GrammarError(f'{place} has "oneOf", which cannot be enforced in a text. Use "anyOf".')
        return " | ".join(f"({one})" for one in forms)
    return None


def _string(schema: Mapping[str, Any], place: str) -> str:
    found = next((name for name in _COMBINING if name in schema), None)
    if found is not None:
        raise GrammarError(f'{place} has "{found}", which cannot be enforced in a text. {_ADVICE}')
    forms = []
    least, most = (_length(schema, name, place) for name in ("minLength", "maxLength"))
    if least or most is not None:
        if most is not None and most < (least or 0):
            raise GrammarError(f'{place} has a "maxLength" below its "minLength": no text is valid.')
        forms.append(f"/(.|\\n){{{least or 0},{'' if most is None else most}}}/")
    if schema.get("pattern") is not None:
        forms.append(_found(schema["pattern"], place))
    if schema.get("format") is not None:
        known = _FORMATS.get(str(schema["format"]))
        if known is None:
            raise GrammarError(
                f'{place} has the "format" {str(schema["format"])[:40]!r}, which is not known. {_ADVICE}'
            )
        forms.append(regex(known))
    return " & ".join(f"({one})" for one in forms) or ANY


def _length(schema: Mapping[str, Any], name: str, place: str) -> int | None:
    given = schema.get(name)
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (int, float)) or given < 0 or given != int(given):
        raise GrammarError(f'{place} has a "{name}" that is no length.')
    return int(given)


def _found(pattern: Any, place: str) -> str:
    """The texts in which a pattern is found: where it has no anchor, anything may stand beside it."""
    if not isinstance(pattern, str):
        raise GrammarError(f'{place} has a "pattern" that is no text.')
    anchors, has_choice = _anchors(pattern)
    begins, ends = 0 in anchors and pattern[:1] == "^", len(pattern) - 1 in anchors and pattern[-1:] == "$"
    if len(anchors) > begins + ends or (anchors and has_choice):
        raise GrammarError(
            f'{place} has a "pattern" with ^ or $ within it, which cannot be enforced in a text. Put ^( before all of '
            "it and )$ behind it."
        )
    body = pattern[1 if begins else 0 : len(pattern) - ends]
    return " ".join(([] if begins else [ANY]) + [regex(f"({body})")] + ([] if ends else [ANY]))


def _anchors(pattern: str) -> tuple[list[int], bool]:
    """Where a pattern has ^ and $, and whether it is a choice (of "|", outside all brackets)."""
    anchors, depth, is_class, has_choice, at = [], 0, False, False, 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 2
            continue
        if is_class:
            is_class = char != "]"
        elif char == "[":
            is_class = True
        elif char in "^$":
            anchors.append(at)
        else:
            depth += {"(": 1, ")": -1}.get(char, 0)
            has_choice |= char == "|" and depth == 0
        at += 1
    return anchors, has_choice
