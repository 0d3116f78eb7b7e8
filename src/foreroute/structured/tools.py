"""The form of tool calls, as a grammar: which tools there are, and which arguments each takes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foreroute.errors import GrammarError
from foreroute.structured.grammar import Grammar, checked_schema, quoted

_ANY = r"/(.|\n)*/"


@dataclass(frozen=True)
class CallableTool:
    """A tool's name, and the JSON schema of its arguments (an object's)."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})


@dataclass(frozen=True)
class JsonCall:
    """A call whose arguments are JSON: `begin` NAME `between` ARGUMENTS `end`.

    Hermes: begin '<tool_call>\\n{"name": "', between '", "arguments": ', end '}\\n</tool_call>'.
    """

    begin: str
    between: str
    end: str


@dataclass(frozen=True)
class TaggedCall:
    """A call with a pair of tags for each argument; texts are written as they are, other values as JSON.

    `begin` NAME `between`, for each argument `key_begin` KEY `key_end` VALUE `value_end`, then `end`. Qwen3-Coder:
    '<tool_call>\\n<function=', '>\\n', ('<parameter=', '>\\n', '\\n</parameter>\\n'), '</function>\\n</tool_call>'.
    """

    begin: str
    between: str
    key_begin: str
    key_end: str
    value_end: str
    end: str


def tool_calls(
    tools: Sequence[CallableTool],
    form: JsonCall | TaggedCall,
    *,
    special: Mapping[str, int] | None = None,
    opening: str = "",
    separator: str = "",
    closing: str = "",
    most: int = 1,
    is_required: bool = True,
) -> Grammar:
    """Return the grammar of an answer that calls tools.

    Args:
        tools: those that may be called. form: how a call is written.
        special: id of each special token by its text: where a form spells one, that token is meant.
        opening, separator, closing: what is written before all calls, between two, and behind all.
        most: calls at most. is_required: False also allows free text instead of calls.
    Raises:
        GrammarError: no tool, a name twice, parameters that are no object's schema or cannot be written in this form.
    """
    names = [tool.name for tool in tools]
    if not names:
        raise GrammarError("There is no tool to call.")
    if len(set(names)) < len(names):
        raise GrammarError(f"The tool {next(one for one in names if names.count(one) > 1)!r} occurs twice.")
    lark = _Writer(special or {})
    calls = " | ".join(f"call_{at}" for at in range(len(tools)))
    again = f" ({lark.text(separator)} ({calls})){{0,{most - 1}}}" if most > 1 else ""
    whole = f"{lark.text(opening)} ({calls}){again} {lark.text(closing)}"
    rules = [f"start: {whole}" if is_required else f"start: calls | FREE\ncalls: {whole}\nFREE: {_ANY}"]
    for at, tool in enumerate(tools):
        rules += _json_rules(at, tool, form, lark) if isinstance(form, JsonCall) else _tagged(at, tool, form, lark)
    return Grammar("lark", "\n".join([*rules, *lark.terminals()]))


def written(text: str, special: Mapping[str, int]) -> str:
    """Return a text in Lark's syntax; where it spells a special token, that token is meant."""
    return _Writer(special).text(text)


class _Writer:
    """Writes texts in Lark's syntax; special tokens, which no text matches, by their ids."""

    def __init__(self, special: Mapping[str, int]) -> None:
        # Longest first: one token's text may begin another's.
        self._special = sorted(((text, one) for text, one in special.items() if text), key=lambda it: -len(it[0]))
        self._raw: dict[str, str] = {}

    def text(self, text: str) -> str:
        """A text, which may spell special tokens."""
        return " ".join(self._parts(text))

    def _parts(self, text: str) -> Iterator[str]:
        if not text:
            return
        for spelt, one in self._special:
            before, found, behind = text.partition(spelt)
            if found:
                yield from self._parts(before)
                yield f"<[{one}]>"
                yield from self._parts(behind)
                return
        yield quoted(text)

    def raw_until(self, end: str) -> str:
        """Free text up to and with `end`."""
        if any(end.startswith(spelt) for spelt, _ in self._special):
            return f"{self._named('RAW', _ANY)} {self.text(end)}"
        return self._named("raw", f"{_ANY} {quoted(end)}", lazily=True)

    def _named(self, kind: str, rule: str, *, lazily: bool = False) -> str:
        name = f"{kind}_{len(self._raw)}"
        return self._raw.setdefault(f"{'[lazy]' if lazily else ''}: {rule}", name)

    def terminals(self) -> list[str]:
        """The rules that `raw_until` refers to."""
        return [f"{name}{rule}" for rule, name in self._raw.items()]


def _json_rules(at: int, tool: CallableTool, form: JsonCall, lark: _Writer) -> list[str]:
    head = lark.text(form.begin + json.dumps(tool.name, ensure_ascii=False)[1:-1] + form.between)
    schema = json.dumps(_arguments(tool), ensure_ascii=False)
    return [f"call_{at}: {head} args_{at} {lark.text(form.end)}", f"args_{at}: %json {schema}"]


def _tagged(at: int, tool: CallableTool, form: TaggedCall, lark: _Writer) -> list[str]:
    schema = _arguments(tool)
    properties, required = schema.get("properties", {}), schema.get("required") or []
    is_list = isinstance(required, list) and all(isinstance(name, str) for name in required)
    if not is_list or not isinstance(properties, Mapping) or any(name not in properties for name in required):
        raise GrammarError(f"The tool {tool.name!r} requires an argument that its properties do not have.")
    parts, rules = [], []
    for number, (name, value) in enumerate(properties.items()):
        key = lark.text(form.key_begin + name + form.key_end)
        if isinstance(value, Mapping) and value.get("type") == "string" and not value.keys() & {"enum", "const"}:
            rule = f"{key} {lark.raw_until(form.value_end)}"
        else:
            rule = f"{key} value_{at}_{number} {lark.text(form.value_end)}"
            rules.append(f"value_{at}_{number}: {_value(value, schema)}")
        rules.append(f"arg_{at}_{number}: {rule}")
        parts.append(f"arg_{at}_{number}" if name in required else f"arg_{at}_{number}?")
    head = lark.text(form.begin + tool.name + form.between)
    return [f"call_{at}: {head} {' '.join(parts)} {lark.text(form.end)}", *rules]


def _value(value: Any, schema: Mapping[str, Any]) -> str:
    """The rule of a value that is not any text."""
    told = value.get("enum", [value["const"]] if "const" in value else None) if isinstance(value, Mapping) else None
    if isinstance(told, list) and told and all(isinstance(one, str) for one in told):
        return " | ".join(map(quoted, told))
    definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    return "%json " + json.dumps(checked_schema({**definitions, **value} if isinstance(value, Mapping) else value))


def _arguments(tool: CallableTool) -> dict[str, Any]:
    schema = checked_schema(tool.parameters or {"type": "object", "properties": {}})
    if schema.get("type", "object") != "object":
        raise GrammarError(f"The parameters of the tool {tool.name!r} are no object's schema.")
    return {"type": "object", **schema}
