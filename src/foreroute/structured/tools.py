"""The form of tool calls, as a grammar: which tools there are, and which arguments each takes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foreroute.errors import GrammarError
from foreroute.structured.grammar import Grammar, checked_schema
from foreroute.structured.lark import ANY, LarkWriter
from foreroute.structured.tagged import TaggedCall, tagged_rules


@dataclass(frozen=True)
class CallableTool:
    """A tool's name, and the JSON schema of its arguments (an object's); None: any arguments are taken."""

    name: str
    parameters: Mapping[str, Any] | None = field(default_factory=lambda: {"type": "object", "properties": {}})


@dataclass(frozen=True)
class JsonCall:
    """A call whose arguments are JSON: `begin` NAME `between` ARGUMENTS `end`.

    Hermes: begin '<tool_call>\\n{"name": "', between '", "arguments": ', end '}\\n</tool_call>'.
    """

    begin: str
    between: str
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
    lark = LarkWriter(special or {})
    calls = " | ".join(f"call_{at}" for at in range(len(tools)))
    again = f" ({lark.text(separator)} ({calls})){{0,{most - 1}}}" if most > 1 else ""
    whole = f"{lark.text(opening)} ({calls}){again} {lark.text(closing)}"
    rules = [f"start: {whole}" if is_required else f"start: calls | FREE\ncalls: {whole}\nFREE: {ANY}"]
    for at, tool in enumerate(tools):
        rules += _rules(at, tool, form, lark)
    return Grammar("lark", "\n".join([*rules, *lark.terminals()]))


def _rules(at: int, tool: CallableTool, form: JsonCall | TaggedCall, lark: LarkWriter) -> list[str]:
    arguments = None if tool.parameters is None else _arguments(tool.name, tool.parameters)
    if isinstance(form, TaggedCall):
        return tagged_rules(at, tool.name, arguments, form, lark)
    head = form.begin + json.dumps(tool.name, ensure_ascii=False)[1:-1] + form.between
    head = lark.json_text(head) if head.startswith("{") else lark.text(head)
    schema = json.dumps(arguments or checked_schema({"type": "object"}), ensure_ascii=False)
    return [f"call_{at}: {head} args_{at} {lark.text(form.end)}", f"args_{at}: %json {schema}"]


def _arguments(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    schema = checked_schema(parameters or {"type": "object", "properties": {}})
    if schema.get("type", "object") not in ("object", ["object"]):
        raise GrammarError(f"The parameters of the tool {name!r} are no object's schema.")
    return {**schema, "type": "object"}
