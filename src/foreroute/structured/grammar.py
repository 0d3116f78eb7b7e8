"""What an answer has to look like: a JSON schema, a regex, a grammar, or one of some texts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from foreroute.errors import GrammarError
from foreroute.structured.lark import quoted, regex

# Longer sources take seconds to compile.
MOST_CHARS = 2**18
# llguidance's own parser of JSON ends at 128 levels.
_MOST_DEEP = 96
# Between the parts of JSON: a space, or a new line with its indentation. Without a bound, a small model goes on with
# spaces until its last token.
_JSON_OPTIONS = {"whitespace_pattern": r" |\r?\n {0,20}|\r?\n\t{0,6}"}
GrammarKind = Literal["json_schema", "regex", "lark"]


@dataclass(frozen=True)
class Grammar:
    """What an answer has to look like; see the class methods. Not compiled yet, so it may still be refused.

    kind, source: a JSON schema as JSON text, a regular expression, or a grammar in llguidance's Lark syntax.
    start: Lark rules before it, whose `start` refers to it as @answer; "" without any (structured/reasoning.py).
    """

    kind: GrammarKind
    source: str
    start: str = ""

    def __post_init__(self) -> None:
        if len(self.source) + len(self.start) > MOST_CHARS:
            length = len(self.source) + len(self.start)
            raise GrammarError(f"It has {length} characters; at most {MOST_CHARS} are compiled.")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> "Grammar":
        """JSON that is valid by `schema`, a JSON schema (or its text). Properties come in the schema's order.

        Raises:
            GrammarError: it is no schema, or is nested too deep.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise GrammarError("The schema is not valid JSON.") from error
        return cls("json_schema", json.dumps(checked_schema(schema), ensure_ascii=False))

    @classmethod
    def json_object(cls) -> "Grammar":
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """Text that matches all of `pattern`, in Rust's syntax: no look-around, no backreferences.

        Raises:
            GrammarError: it is empty.
        """
        if not pattern:
            raise GrammarError("The pattern is empty.")
        return cls("regex", pattern)

    @classmethod
    def grammar(cls, text: str) -> "Grammar":
        """Text of a grammar in llguidance's Lark syntax or in llama.cpp's GBNF (`root ::= ...`).

        Raises:
            GrammarError: it is empty, or not GBNF though it looks like it.
        """
        if not text.strip():
            raise GrammarError("The grammar is empty.")
        if "::=" not in text:
            return cls("lark", text)
        if len(text) > MOST_CHARS // 4:
            raise GrammarError(f"It has {len(text)} characters; at most {MOST_CHARS // 4} of GBNF are read.")
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            return cls("lark", any_to_lark(text))
        except RecursionError:
            raise GrammarError("The grammar is nested too deep.") from None
        except Exception as error:  # the converter raises plain Exception too
            raise GrammarError(f"The grammar cannot be read as GBNF: {str(error)[:200]}.") from error

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Grammar":
        """One of `texts`, and nothing else.

        Raises:
            GrammarError: there is none.
        """
        if not texts:
            raise GrammarError("There is no choice.")
        return cls("lark", "start: " + " | ".join(map(quoted, texts)))

    @property
    def text(self) -> str:
        """As llguidance reads it."""
        named = {"json_schema": "json_schema", "lark": "lark_grammar", "regex": "lark_grammar"}[self.kind]
        source: Any = self.source
        if self.kind == "json_schema":
            source = json.loads(source)
        elif self.kind == "regex":
            # As JSON: what a pattern may hold, "/" among it, need not be escaped.
            source = f"start: TEXT\nTEXT: {regex(self.source)}"
        parts = [{"name": "answer", named: source}]
        if self.start:
            parts.insert(0, {"name": "whole", "lark_grammar": self.start})
        return json.dumps({"grammars": parts})


def checked_schema(schema: Any) -> dict[str, Any]:
    """Return a JSON schema with our options of writing JSON.

    Raises:
        GrammarError: it is none, or is nested too deep.
    """
    if schema is False:
        raise GrammarError("The schema is false: no answer is valid.")
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise GrammarError("A JSON schema is an object.")
    if _depth(schema) > _MOST_DEEP:
        raise GrammarError(f"The schema is nested deeper than {_MOST_DEEP} levels.")
    return {**_with_bounded_names(schema), "x-guidance": _JSON_OPTIONS}


# A host name's length (RFC 1123), which llguidance's grammar of the format does not hold to.
_MOST_OF_HOST_NAME = 253
# Keywords whose values are data, and those whose keys are names of other schemas.
_DATA = frozenset({"const", "enum", "default", "examples"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def _with_bounded_names(schema: Any, *, are_names: bool = False) -> Any:
    """Return `schema` with a longest length for each text of the format "hostname" that has none.

    are_names: its keys are names of schemas, and no keywords.
    """
    if isinstance(schema, (list, tuple)):
        return [_with_bounded_names(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    if are_names:
        return {name: _with_bounded_names(one) for name, one in schema.items()}
    inner = {
        key: one if key in _DATA else _with_bounded_names(one, are_names=key in _NAMED) for key, one in schema.items()
    }
    return {"maxLength": _MOST_OF_HOST_NAME, **inner} if inner.get("format") == "hostname" else inner


def _depth(schema: Any) -> int:
    level: list[Any] = [schema]
    depth = 0
    while level:
        depth += 1
        level = [inner for outer in level for inner in _inner(outer) if isinstance(inner, (Mapping, list, tuple))]
    return depth


def _inner(outer: Any) -> Iterator[Any]:
    yield from outer.values() if isinstance(outer, Mapping) else outer
