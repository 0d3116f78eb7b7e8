"""Read traces of format version 1, which has other names for some fields and kinds of loads than docs/trace.md."""

from typing import Any

from foreroute.trace import VERSION

READ_VERSIONS = (1, VERSION)
_FOUND = {"late": "late_hits", "stood_in": "substituted"}
_COUNTS = _FOUND | {
    "fill_loads": "deferred_loads", "fill_bytes": "deferred_bytes", "unguessed_steps": "steps_without_prefetch",
}  # fmt: skip


def modernised(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event of version 1 in the current version's names; unknown fields stay as they are."""
    kind = event.get("event")
    if kind == "header":
        return event | {"version": VERSION}
    if kind == "layer":
        return _renamed(event, _FOUND)
    if kind == "load" and event.get("why") == "fill":
        return event | {"why": "deferred"}
    if kind == "end" and isinstance(event.get("stats"), dict):
        return event | {"stats": {name: _renamed(value, _COUNTS) for name, value in event["stats"].items()}}
    return event


def _renamed(fields: Any, names: dict[str, str]) -> Any:
    return {names.get(name, name): value for name, value in fields.items()} if isinstance(fields, dict) else fields
