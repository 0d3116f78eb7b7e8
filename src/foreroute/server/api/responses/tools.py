"""The tools of a request: functions, custom ones, and namespaces of either; hosted ones are left out."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from foreroute.server.api.chat_messages import function_tool, refuse_namesakes
from foreroute.server.api.problems import not_possible, not_supported
from foreroute.server.api.strict import MOST_TOOLS, screened
from foreroute.server.dialogue.messages import Tool

_HINTS = ("output_schema",)
_REFUSED: dict[str, tuple[Any, ...]] = {"defer_loading": (False,), "allowed_callers": (["direct"], [])}
# OpenAI runs them itself. Codex offers them always: a model that is not told of them calls none.
_LEFT_OUT = frozenset({"web_search", "web_search_preview", "image_generation"})


class NamedTool(NamedTuple):
    """A tool of the request. name: its own. namespace: its namespace's; "" without one. is_custom: its calls are text.
    tool: as the model is told of it."""

    name: str
    namespace: str
    is_custom: bool
    tool: Tool

    @property
    def said(self) -> str:
        """What an error calls it."""
        custom = "custom " if self.is_custom else ""
        return f"{custom}{self.name!r}" + (f" of the namespace {self.namespace!r}" if self.namespace else "")


def known_name(namespace: str | None, name: str) -> str:
    """The name by which the model knows a tool."""
    return f"{namespace}__{name}" if namespace else name


def chosen_name(choice: Mapping[str, Any]) -> str:
    """The name by which the model knows the tool that a choice of tools names."""
    return known_name(choice.get("namespace"), str(choice.get("name")))


def named_tools(given: list[Any]) -> tuple[NamedTool, ...]:
    """The tools that the model is told of.

    Raises:
        ApiError: a tool is not valid, or of a type that is not supported; or the model knows two by one name.
    """
    found: list[NamedTool] = []
    for at, one in enumerate(given):
        for tool in _of(one, f"tools.{at}"):
            if len(found) == MOST_TOOLS:
                raise not_possible("tools", f"There are more than {MOST_TOOLS} tools, those of namespaces counted.")
            found.append(tool)
    refuse_namesakes((one.tool, one.said) for one in found)
    return tuple(found)


def _of(given: Any, place: str) -> Iterator[NamedTool]:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "namespace":
        name, tools = given.get("name"), given.get("tools")
        if not isinstance(name, str) or not name or not isinstance(tools, list):
            raise not_possible(place, f"{place}: a namespace needs a name and its tools.")
        for number, one in enumerate(tools):
            yield _one(one, f"{place}.tools.{number}", name)
    elif not isinstance(kind, str) or kind not in _LEFT_OUT:
        yield _one(given, place, "")


def _one(given: Any, place: str, namespace: str) -> NamedTool:
    if not isinstance(given, dict):
        raise not_possible(place, f"{place} must be an object.")
    kind, name = given.get("type"), given.get("name")
    if kind not in ("function", "custom"):
        shown = str(kind)[:40]
        raise not_supported(
            place, f"Tools of the type {shown!r} are not supported here: function, custom and namespace alone."
        )
    # Not joined yet: a name that is none is told of as it was given.
    named = {"name": known_name(namespace, name) if isinstance(name, str) else name}
    if kind == "function":
        tool = function_tool({**screened(given, ("type", *_HINTS), _REFUSED, place=f"{place}."), **named}, place)
    else:
        tool = function_tool({**named, **_as_function(given, place)}, place)
    return NamedTool(str(name), namespace, kind == "custom", tool)


def _as_function(given: dict[str, Any], place: str) -> dict[str, Any]:
    """A custom tool as a function of one text."""
    given = screened(given, _HINTS, _REFUSED, place=f"{place}.")
    described = given.get("description")
    told = [described] if isinstance(described, str) and described else []
    form = given.get("format")
    if isinstance(form, dict) and form.get("type") == "grammar":
        told.append(f"The input is text of this {form.get('syntax')} grammar:\n{form.get('definition')}")
    text = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    return {"description": "\n\n".join(told), "parameters": text}
