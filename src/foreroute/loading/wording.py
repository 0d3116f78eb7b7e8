"""Errors speak of `memory=` to Python, and of `--memory` on the command line: one text, told in the caller's words.

Messages are written with flags. `load` raises them with keyword arguments, unless the command line is running.
"""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import ParamSpec, TypeVar

from foreroute.config import EngineConfig
from foreroute.errors import ForerouteError

_Asked = ParamSpec("_Asked")
_Made = TypeVar("_Made")

_ARGUMENTS = {option.name for option in fields(EngineConfig)} | {"dtype", "revision"}
# A value is a size, a share, a number, or a name with a digit; a word is one only where it is a choice of the flag.
_SIZE = r"\d+(?:\.\d+)?[A-Za-z]*%?|[a-z][\w:-]*\d(?:\.\d+)?\w*"
# What is in backticks, a command, stays as it is.
_FLAG = re.compile(rf"(`[^`]*`)|--(no-)?([a-z][a-z-]*[a-z])(?: ({_SIZE}|[A-Za-z_]+)(?!\w))?")

_spoken: list[str] = []


@contextmanager
def as_flags() -> Iterator[None]:
    """While inside, errors of `load` speak of flags: for the command line."""
    _spoken.append("flags")
    try:
        yield
    finally:
        _spoken.pop()


def as_arguments(text: str) -> str:
    """Turn flags in `text` into arguments: '--memory 8GiB' into 'memory="8GiB"', '--no-cache' into 'cache=False'."""
    return _FLAG.sub(_argument, text)


def _argument(found: re.Match[str]) -> str:
    quoted, negated, flag, value = found.groups()
    name = (flag or "").replace("-", "_")
    if quoted or name not in _ARGUMENTS:
        return found[0]
    if negated:
        return f"{name}=False" + (f" {value}" if value else "")
    if value and (re.fullmatch(_SIZE, value) or value in _choices(name)):
        return f"{name}={value if value.isdecimal() else chr(34) + value + chr(34)}"
    return f"{name}=" + (f" {value}" if value else "")


def _choices(name: str) -> tuple[str, ...]:
    known = {option.name: option.metadata["choices"] for option in fields(EngineConfig)}
    more = {"packed": ("no", "auto"), "predictor": ("no", "auto"), "dtype": ("bfloat16", "float16", "float32"),
            "policy": ("exact", "speculative", "paper")}  # fmt: skip
    return (*known.get(name, ()), *more.get(name, ()))


def in_callers_words(loading: Callable[_Asked, _Made]) -> Callable[_Asked, _Made]:
    """Decorate a function that Python and the command line call: its errors speak of arguments, or of flags."""

    @functools.wraps(loading)
    def told(*args: _Asked.args, **kwargs: _Asked.kwargs) -> _Made:
        try:
            return loading(*args, **kwargs)
        except ForerouteError as error:
            if not _spoken and error.args and isinstance(error.args[0], str):
                error.args = (as_arguments(error.args[0]), *error.args[1:])
            raise

    return told
