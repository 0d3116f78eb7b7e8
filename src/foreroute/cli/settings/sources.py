"""Fill in the flags that were not typed: from the environment, the config file, or their defaults, in this order."""

import argparse
import dataclasses
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreroute.cli.settings.file import FILE_VARIABLE, ConfigFile, read_config_file
from foreroute.cli.settings.flags import convert, default_of, settable
from foreroute.config import EngineConfig
from foreroute.errors import ForerouteError
from foreroute.policy import Policy
from foreroute.units import parse_memory

_PREFIX = "FOREROUTE_"
# Read elsewhere: by kernels/ggml/library.py, and by file.py.
_OTHERS = frozenset({"FOREROUTE_GGML", FILE_VARIABLE})
# Kubernetes gives containers such variables for a service that is called foreroute.
_OF_A_SERVICE = re.compile(r"\w+_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP)\w*)")
_ADDRESSES = ("tcp://", "udp://")
_UNSET: Any = object()
_WHOLE_HELP = frozenset({"-h", "--help", "--help-all"})
_ENGINE = {option.name for option in dataclasses.fields(EngineConfig)}


@dataclass(frozen=True)
class FlagValue:
    """The value of the flag `key`. source: "flag", "environment", "file" or "default". origin: which variable, or
    which line of which file."""

    key: str
    value: Any
    source: str
    origin: str = ""


def parse_command(
    name: str, words: Sequence[str], commands: Mapping[str, argparse.ArgumentParser]
) -> tuple[argparse.Namespace, list[str]]:
    """Parse the `words` behind the command `name`; flags that are not among them get what is set elsewhere.

    Returns:
        What was parsed, with `settings` (where each value came from), `aliases` and `config_file` besides; and the
        words that are not known.
    Raises:
        ForerouteError: a setting is not known or has a wrong value; it is named with its place.
    """
    parser = commands[name]
    flags = settable(parser)
    if not flags or _WHOLE_HELP & {*words}:
        args, unknown = parser.parse_known_args(words)
        args.command = name
        return args, unknown
    known = {command: settable(one) for command, one in commands.items()}
    file, variables = read_config_file(known), _variables(known)
    # A list that is appended to begins with None where nothing was typed.
    lists = {action.dest for action in flags.values() if isinstance(action, argparse._AppendAction)}
    given = argparse.Namespace(**{one.dest: None if one.dest in lists else _UNSET for one in flags.values()})
    asked = _asked(name, None, flags, file, variables)
    _ease(parser, flags, asked, is_shown="--print-config" in words)
    args, unknown = parser.parse_known_args(words, given)
    typed = {key for key, action in flags.items() if getattr(args, action.dest) is not (
        None if action.dest in lists else _UNSET)}  # fmt: skip
    asked = _asked(name, _model_of(args, asked, typed), flags, file, variables)
    _leave_out_rivals(parser, flags, asked, typed)
    args.settings = tuple(_filled(args, flags, asked, typed))
    args.command, args.aliases, args.config_file = name, file.aliases, file.path
    return args, unknown


def _variables(known: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The environment variables that set flags, by their names without the prefix, in small letters.

    Raises:
        ForerouteError: one of the prefix is not known.
    """
    names = {key for keys in known.values() for key in keys}
    names |= {f"{command}_{key}" for command, keys in known.items() for key in keys}
    found = {}
    for variable, value in os.environ.items():
        name = variable.removeprefix(_PREFIX).lower()
        is_ours = variable.startswith(_PREFIX) and variable not in _OTHERS
        if not is_ours or not value or value.startswith(_ADDRESSES) or _OF_A_SERVICE.fullmatch(variable):
            continue
        if name not in names:
            near = difflib.get_close_matches(name, sorted(names), 1, 0.6)
            hint = f" Did you mean {_PREFIX}{near[0].upper()}?" if near else ""
            raise ForerouteError(f"The environment has {variable}, which sets no flag of any command.{hint} Unset it.")
        found[name] = value
    return found


def _asked(
    command: str,
    model: str | None,
    flags: Mapping[str, argparse.Action],
    file: ConfigFile,
    variables: Mapping[str, str],
) -> dict[str, FlagValue]:
    """What the environment and the file set of the command's flags, where the model is `model`."""
    found: dict[str, FlagValue] = {}
    for key, action in flags.items():
        for source, origin, value in _candidates(command, model, key, file, variables):
            made = convert(key, action, value, origin)
            _check(key, made, origin)
            found[key] = FlagValue(key, made, source, origin)
            break
    return found


def _candidates(
    command: str, model: str | None, key: str, file: ConfigFile, variables: Mapping[str, str]
) -> Iterator[tuple[str, str, Any]]:
    """Where `key` is set, the place that wins first: its source, its name, and the value there."""
    for name in (f"{command}_{key}", key):
        if name in variables:
            yield "environment", f"{_PREFIX}{name.upper()}", variables[name]
    for name, told in file.models.items():
        if key in told and model is not None and _is_same(name, model, file.aliases):
            yield "file", file.where("models", name, _spelt(file, ("models", name), key)), told[key]
    if key in file.commands.get(command, {}):
        yield "file", file.where(command, _spelt(file, (command,), key)), file.commands[command][key]
    if key in file.everywhere:
        yield "file", file.where(_spelt(file, (), key)), file.everywhere[key]


def _spelt(file: ConfigFile, section: tuple[str, ...], key: str) -> str:
    """The key as the file has it: perhaps with hyphens."""
    hyphens = key.replace("_", "-")
    return hyphens if (*section, hyphens) in file.lines else key


def _is_same(name: str, model: str, aliases: Mapping[str, str]) -> bool:
    """Whether both are names of one model, aliases and "~" resolved."""
    names = [str(Path(aliases.get(one, one)).expanduser()) for one in (name, model)]
    return names[0] == names[1]


def _check(key: str, value: Any, origin: str) -> None:
    """Hold a value to what the engine takes, while it is known where it came from."""
    try:
        if key in ("memory", "host_memory"):
            for one in value if isinstance(value, list) else [value]:
                parse_memory(one, 2**40)
        elif key == "policy":
            Policy.parse(value)
        elif key in _ENGINE and not isinstance(value, list | Path):
            EngineConfig(**{key: value})
    except ForerouteError as error:
        raise ForerouteError(f"{origin}: {error}") from error


def _ease(
    parser: argparse.ArgumentParser, flags: Mapping[str, argparse.Action], asked: Mapping[str, FlagValue], *,
    is_shown: bool,
) -> None:  # fmt: skip
    """Let flags that are required be set elsewhere, and `--print-config` stand without any argument."""
    for key, action in flags.items():
        action.required = action.required and key not in asked and not is_shown
    for group in parser._mutually_exclusive_groups:
        members = {id(action) for action in group._group_actions}
        is_set = any(id(action) in members for key, action in flags.items() if key in asked)
        group.required = group.required and not is_set and not is_shown
    for action in parser._actions:
        if is_shown and not action.option_strings and action.nargs is None:
            action.nargs, action.required = "?", False


def _model_of(args: argparse.Namespace, asked: Mapping[str, FlagValue], typed: set[str]) -> str | None:
    """The model of the command: its argument, or its flag, which may be set too."""
    for name in ("model", "model_flag"):
        value = getattr(args, name, None)
        if isinstance(value, str):
            return value
    return str(asked["model"].value) if "model" in asked and "model" not in typed else None


def _leave_out_rivals(
    parser: argparse.ArgumentParser, flags: Mapping[str, argparse.Action], asked: dict[str, FlagValue], typed: set[str]
) -> None:
    """Of flags that exclude each other keep what was typed, else what the environment sets, else the file's.

    Raises:
        ForerouteError: one of these sets two of them.
    """
    rank = {"flag": 0, "environment": 1, "file": 2}
    for group in parser._mutually_exclusive_groups:
        members = {id(action) for action in group._group_actions}
        rivals = [key for key, action in flags.items() if id(action) in members and (key in asked or key in typed)]
        ranks = {key: 0 if key in typed else rank[asked[key].source] for key in rivals}
        first = [key for key in rivals if ranks[key] == min(ranks.values())]
        if len(first) > 1 and not typed & {*first}:
            origins = " and ".join(f"{key} ({asked[key].origin})" for key in first)
            raise ForerouteError(f"{origins} exclude each other. Set one of them.")
        for key in rivals:
            if key not in first:
                asked.pop(key, None)


def _filled(
    args: argparse.Namespace, flags: Mapping[str, argparse.Action], asked: Mapping[str, FlagValue], typed: set[str]
) -> Iterator[FlagValue]:
    for key, action in flags.items():
        if key in typed:
            setting = FlagValue(key, getattr(args, action.dest), "flag", action.option_strings[-1])
        else:
            setting = asked.get(key) or FlagValue(key, default_of(action), "default")
            setattr(args, action.dest, setting.value)
        yield setting
