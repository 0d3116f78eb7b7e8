"""Which flags of a command can be set elsewhere, under which key, and how a setting becomes a flag's value."""

import argparse
import os
from typing import Any

from foreroute.errors import ForerouteError

# Each confirms what is about to happen, or asks about this one call: to be typed.
_TYPED_ONLY = frozenset({"yes", "force", "confirm_run_unsafe_code", "print_config"})
_SECRET = frozenset({"api_key"})
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_SHOWN_CHARACTERS = 60


def key_of(flag: str) -> str:
    """The key of a flag, or of a key that is spelt with hyphens: "max_new_tokens" of "--max-new-tokens"."""
    return flag.lstrip("-").replace("-", "_")


def settable(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The flags of `parser` that settings can set, by key; a flag that stands for a positional argument is not among
    them."""
    kinds = (argparse._StoreAction, argparse._AppendAction, argparse._StoreTrueAction, argparse.BooleanOptionalAction)
    positional = {action.dest for action in parser._actions if not action.option_strings}
    found: dict[str, argparse.Action] = {}
    for action in parser._actions:
        long = next((option for option in action.option_strings if option.startswith("--")), None)
        if long is not None and isinstance(action, kinds) and key_of(long) not in {*_TYPED_ONLY, *positional}:
            found.setdefault(key_of(long), action)
    return found


def typed_only(key: str) -> bool:
    """Whether `key` is that of a flag which must be typed each time."""
    return key in _TYPED_ONLY


def shown(key: str, value: Any) -> Any:
    """The value as it may be printed, and as JSON: without secrets."""
    if key in _SECRET and value:
        return "(hidden)"
    if isinstance(value, list | tuple):
        return [shown(key, one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def default_of(action: argparse.Action) -> Any:
    """The flag's default, of the flag's type."""
    default = action.default
    return action.type(default) if isinstance(default, str) and callable(action.type) else default


def convert(key: str, action: argparse.Action, value: Any, origin: str) -> Any:
    """Make the flag's value of a setting's.

    Args:
        value: of TOML, or the text of an environment variable. origin: where it stands, for the message.
    Raises:
        ForerouteError: the flag does not take it.
    """
    if isinstance(action, argparse._StoreTrueAction | argparse.BooleanOptionalAction):
        made = value if isinstance(value, bool) else _SWITCH.get(str(value).strip().lower())
        if made is None:
            raise _wrong(key, value, origin, "it must be true or false")
        return made
    if isinstance(action, argparse._AppendAction) or action.nargs in ("+", "*"):
        values = value if isinstance(value, list) else [value]
        if not values:
            raise _wrong(key, value, origin, "the list is empty")
        return [_one(key, action, one, origin) for one in values]
    return _one(key, action, value, origin)


def _one(key: str, action: argparse.Action, value: Any, origin: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _wrong(key, value, origin, "it must be a text or a number")
    # A shell would have done so.
    text = os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else str(value)
    try:
        made = action.type(text) if callable(action.type) else text
    except argparse.ArgumentTypeError as error:
        raise _wrong(key, value, origin, str(error)) from error
    except (ValueError, TypeError) as error:
        kinds = {
            "int": "it must be a whole number",
            "integer": "it must be a whole number",
            "number": "it must be a number",
        }
        why = kinds.get(getattr(action.type, "__name__", ""), f"{action.option_strings[-1]} does not take it")
        raise _wrong(key, value, origin, why) from error
    if action.choices is not None and made not in action.choices:
        raise _wrong(key, value, origin, f"choose one of {', '.join(map(str, action.choices))}")
    return made


def _wrong(key: str, value: Any, origin: str, why: str) -> ForerouteError:
    if key in _SECRET:
        return ForerouteError(f"{origin}: {key} has a value that it cannot have.")
    text = repr(value)
    text = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    return ForerouteError(f"{origin}: {key} is {text}: {why.rstrip('.')}.")
