"""Read the config file: TOML, whose every section and key must be known, each named with its line where it is not."""

import difflib
import os
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foreroute.cli.settings.flags import key_of, typed_only
from foreroute.errors import ForerouteError
from foreroute.whole_files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_VARIABLE = "FOREROUTE_CONFIG"
_MODELS, _ALIASES = "models", "aliases"
_HEADER = re.compile(r"\s*\[[^\[\]].*\]\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([\w-]+))\s*=""")

Place = tuple[str, ...]


@dataclass(frozen=True)
class ConfigFile:
    """What the config file says; keys are those of flags (max_new_tokens).

    path: None where there is no file. everywhere: for all commands that have such a flag; commands: for one of them;
    models: for a model, by its name. aliases: names of models. lines: where a section or key stands, counted from 1.
    """

    path: Path | None = None
    everywhere: Mapping[str, Any] = field(default_factory=dict)
    commands: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[Place, int] = field(default_factory=dict)

    def where(self, *place: str) -> str:
        """Name a place in the file for a message: the file, the line and the section."""
        line = self.lines.get(place)
        section = f", [{'.'.join(place[:-1])}]" if len(place) > 1 else ""
        return f"{self.path}{'' if line is None else f', line {line}'}{section}"


def config_path() -> Path | None:
    """Where the config file is looked for: FOREROUTE_CONFIG, where "" is none; else the user's folder of settings."""
    asked = os.environ.get(FILE_VARIABLE)
    if asked is not None:
        return Path(asked).expanduser() if asked else None
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "foreroute" / "config.toml"


def read_config_file(known: Mapping[str, Collection[str]]) -> ConfigFile:
    """Read the config file; without one it says nothing.

    Args:
        known: the keys of each command.
    Raises:
        ForerouteError: it cannot be read, is no TOML, or has an unknown section or key.
    """
    path = config_path()
    if path is None or (FILE_VARIABLE not in os.environ and not path.exists()):
        return ConfigFile()
    text = read_text(path, ForerouteError)
    try:
        told = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ForerouteError(f"{path} is no TOML: {error}.") from error
    return _checked(ConfigFile(path, lines=_lines(text)), told, known)


def _checked(file: ConfigFile, told: Mapping[str, Any], known: Mapping[str, Collection[str]]) -> ConfigFile:
    every_key = {key for keys in known.values() for key in keys}
    everywhere: dict[str, Any] = {}
    commands: dict[str, Mapping[str, Any]] = {}
    for name, value in told.items():
        if not isinstance(value, dict):
            everywhere[_known_key(file, (name,), every_key)] = value
        elif name in known:
            commands[name] = _section(file, (name,), value, known[name])
        elif name not in (_MODELS, _ALIASES):
            raise _unknown(file, (name,), "section", {*known, _MODELS, _ALIASES})
    models = {
        name: _section(file, (_MODELS, name), value, every_key) for name, value in _table(file, told, _MODELS).items()
    }
    aliases = {name: _alias(file, name, value) for name, value in _table(file, told, _ALIASES).items()}
    return ConfigFile(file.path, everywhere, commands, models, aliases, file.lines)


def _table(file: ConfigFile, told: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = told.get(name, {})
    if not isinstance(found, dict):  # as a key it is unknown, which was said
        raise ForerouteError(f"{file.where(name)}: {name} must be a section, [{name}].")
    return found


def _section(file: ConfigFile, place: Place, told: Any, keys: Collection[str]) -> Mapping[str, Any]:
    if not isinstance(told, dict):
        raise ForerouteError(f'{file.where(*place)}: {place[-1]} must be a section, [{place[0]}."{place[-1]}"].')
    return {_known_key(file, (*place, name), keys): value for name, value in told.items()}


def _known_key(file: ConfigFile, place: Place, keys: Collection[str]) -> str:
    key = key_of(place[-1])
    if typed_only(key):
        raise ForerouteError(f"{file.where(*place)}: {place[-1]} is no setting: --{place[-1]} is typed each time.")
    if key not in keys:
        raise _unknown(file, place, "setting", keys)
    return key


def _alias(file: ConfigFile, name: str, target: Any) -> str:
    where = file.where(_ALIASES, name)
    if not isinstance(target, str) or not target:
        raise ForerouteError(f'{where}: {name} must be the text of a path or hub id: {name} = "/path/of/model".')
    if not name or "/" in name or "\\" in name:
        raise ForerouteError(f"{where}: {name!r} is no name for a model: it would be a path or a hub id.")
    return target


def _unknown(file: ConfigFile, place: Place, kind: str, known: Collection[str]) -> ForerouteError:
    near = difflib.get_close_matches(key_of(place[-1]), sorted(known), 1, 0.6)
    hint = (
        f" Did you mean {near[0]}?" if near else f" There are: {', '.join(sorted(known))}." if len(known) < 25 else ""
    )
    return ForerouteError(f"{file.where(*place)}: there is no {kind} {place[-1]!r} here.{hint}")


def _lines(text: str) -> dict[Place, int]:
    """The line of each section and key, found by their form; of a text within a text perhaps another's."""
    found: dict[Place, int] = {}
    section: Place = ()
    for number, line in enumerate(text.splitlines(), 1):
        if _HEADER.match(line):
            section = _section_name(line)
            found.setdefault(section, number)
        elif (key := _KEY.match(line)) is not None:
            found.setdefault((*section, next(name for name in key.groups() if name is not None)), number)
    return found


def _section_name(header: str) -> Place:
    try:
        told: Any = tomllib.loads(header)
    except tomllib.TOMLDecodeError:  # within a text of several lines
        return ()
    place: list[str] = []
    while told:
        ((name, told),) = told.items()
        place.append(name)
    return tuple(place)
