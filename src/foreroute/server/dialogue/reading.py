"""What a chat template reads, found by rendering small conversations: no two models' templates read the same."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

# Renders messages, with tools or None; None: the template refuses them, or fails.
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], "str | None"]

_ROLES = ("system", "user", "assistant")
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe-tool",
        "description": "probe-description",
        "parameters": {"type": "object", "properties": {"probekey": {"type": "string"}}, "required": ["probekey"]},
    },
}
_LONG_ID, _SHORT_ID = "call_0123456789abcdef01234567", "abcDEF123"


@dataclass(frozen=True)
class TemplateReading:
    """What a template reads.

    has_system: it shows a system's message; others refuse it, or leave it out.
    in_parts: roles whose content must be a list of parts; others' must be text. tool_in_parts: the same of tools'
    answers. has_tools: it shows tools to the model. text_arguments: a call's arguments must be JSON text, not an
    object. empty_is_none: a message that only calls tools must have no content, not an empty one. short_ids: calls' ids
    have nine letters and digits. one_call: of a message's calls it shows the first alone, or refuses several.
    names: the variables that it reads, its own included.
    """

    in_parts: tuple[str, ...] = ()
    tool_in_parts: bool = False
    has_tools: bool = False
    text_arguments: bool = False
    empty_is_none: bool = False
    short_ids: bool = False
    one_call: bool = False
    has_system: bool = True
    names: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Its fields, for JSON."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "TemplateReading":
        """The same from `as_json`, after JSON."""
        read: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in fields.items()}
        return TemplateReading(**read)


def content_for(role: str, text: str, in_parts: Sequence[str]) -> Any:
    """Content in the form that the template reads. One part, as several would be run together."""
    return [{"type": "text", "text": text}] if role in in_parts else text


def read_template(render: Render, names: Sequence[str]) -> TemplateReading:
    """Find out what a template reads. names: see `TemplateReading`."""
    found = _read_messages(render)
    return replace(found, has_system=_has_system(render, found.in_parts), names=tuple(sorted(names)))


def _read_messages(render: Render) -> TemplateReading:
    in_parts = tuple(role for role in _ROLES if _loses(render, role))
    found = TemplateReading(in_parts)
    with_tool = render(_talk(in_parts, ("user",)), [_TOOL])
    if with_tool is None or "probe-tool" not in with_tool:
        return found
    found = TemplateReading(in_parts, has_tools=True)
    for text_arguments in (False, True):
        for empty_is_none in (False, True):
            for short_ids in (False, True):
                for tool_in_parts in (False, True):
                    one = TemplateReading(in_parts, tool_in_parts, True, text_arguments, empty_is_none, short_ids)
                    if _keeps_calls(render, one):
                        return one if _keeps_two(render, one) else replace(one, one_call=True)
    return found


def _talk(in_parts: Sequence[str], roles: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content_for(role, f"probe-{role}", in_parts)} for role in roles]


def _loses(render: Render, role: str) -> bool:
    """Whether a role's content is lost as text, and kept in parts."""
    roles = {"system": ("system", "user"), "user": ("user",), "assistant": ("user", "assistant", "user")}[role]
    for others in ((), _ROLES):
        as_text = render(_talk([one for one in others if one != role], roles), None)
        if as_text is not None and _is_said(as_text, role):
            return False
        in_parts = render(_talk([*others, role], roles), None)
        if in_parts is not None and _is_said(in_parts, role):
            return True
    return False


def _has_system(render: Render, in_parts: Sequence[str]) -> bool:
    """Whether a system's message is shown. A template that shows no user's either is left as it is."""
    user = render(_talk(in_parts, ("user",)), None)
    if user is None or not _is_said(user, "user"):
        return True
    both = render(_talk(in_parts, ("system", "user")), None)
    return both is not None and _is_said(both, "system")


def _is_said(rendered: str, role: str) -> bool:
    # Written out as Python's list, it would be there too.
    return f"probe-{role}" in rendered and "'text'" not in rendered and '"text"' not in rendered


def _called(reading: TemplateReading, values: Sequence[str]) -> list[dict[str, Any]]:
    """A question, a message with a call for each of `values`, and their answers."""
    ids = [(_SHORT_ID if reading.short_ids else _LONG_ID)[:-1] + str(at) for at in range(len(values))]
    calls = []
    for call_id, value in zip(ids, values, strict=True):
        arguments: Any = f'{{"probekey": "{value}"}}' if reading.text_arguments else {"probekey": value}
        function = {"name": "probe-tool", "arguments": arguments}
        calls.append({"id": call_id, "type": "function", "function": function})
    answer = content_for("tool", "probe-answer", ("tool",) if reading.tool_in_parts else ())
    return [
        *_talk(reading.in_parts, ("user",)),
        {"role": "assistant", "content": None if reading.empty_is_none else "", "tool_calls": calls},
        *({"role": "tool", "content": answer, "tool_call_id": one, "name": "probe-tool"} for one in ids),
    ]


def _keeps_two(render: Render, reading: TemplateReading) -> bool:
    """Whether both of two calls in a message are shown."""
    rendered = render(_called(reading, ("probefirst", "probesecond")), [_TOOL]) or ""
    return "probefirst" in rendered and "probesecond" in rendered


def _keeps_calls(render: Render, reading: TemplateReading) -> bool:
    """Whether a call and its answer are shown whole."""
    rendered = render(_called(reading, ("probevalue",)), [_TOOL])
    if rendered is None:
        return False
    # The prompt without the call: what stands in the tool's own description does not count.
    own = render(_talk(reading.in_parts, ("user",)), [_TOOL]) or ""
    has_call = rendered.count("probe-tool") > own.count("probe-tool") and "probevalue" in rendered
    is_wrong = any(
        rendered.count(sign) > own.count(sign) for sign in ("{'probekey'", '\\"probekey', "None", "[{'type'")
    )
    return has_call and "probe-answer" in rendered and not is_wrong
