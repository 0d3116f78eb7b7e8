"""Read what a person types, pastes or pipes, as messages: one line, a block in triple quotes, or a paste of several.

On a terminal GNU readline edits lines and recalls earlier ones; a paste of several lines is one (bracketed paste). A
Python without it (on Windows) leaves editing to the console, and keeps no history.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from foreroute.cli.options import argument_text
from foreroute.errors import PromptError
from foreroute.system.modules import optional

_QUOTES = '"""'
_KEPT_LINES = 1000


def messages(commands: Sequence[str], history: Path | None) -> Iterator[str]:
    """Yield what is said until Ctrl-D or the end of input.

    A backslash at a line's end joins the next line; three double quotes begin a block that ends with three more.

    Args:
        commands: for completion. history: file of earlier lines, read and extended on a terminal; None keeps none.
    """
    return joined(_typed(commands, history) if sys.stdin.isatty() else _piped())


def joined(lines: Iterator[str]) -> Iterator[str]:
    """Join `lines` that belong together into messages."""
    begun: list[str] = []
    in_block = False
    for line in lines:
        if in_block or (not begun and line.lstrip().startswith(_QUOTES)):
            text = line if in_block else line.lstrip()[len(_QUOTES) :]
            in_block = not text.rstrip().endswith(_QUOTES)
            begun.append(text if in_block else text.rstrip()[: -len(_QUOTES)])
            if in_block:
                continue
        elif line.endswith("\\"):
            begun.append(line[:-1])
            continue
        else:
            begun.append(line)
        yield "\n".join(begun).strip("\n")
        begun.clear()
    if begun:
        yield "\n".join(begun).strip("\n")


def _piped() -> Iterator[str]:
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        try:
            yield raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise PromptError(f"Line {number} of standard input is not UTF-8 text (byte {error.start}).") from None


def _typed(commands: Sequence[str], history: Path | None) -> Iterator[str]:
    readline = optional("readline")
    if readline is not None:
        _complete(readline, commands)
    with _remembered(readline, history):
        while True:
            try:
                yield argument_text(input("\n> "), "The line")
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)


def _complete(readline: Any, commands: Sequence[str]) -> None:
    def complete(text: str, state: int) -> str | None:
        fitting = [name for name in commands if name.startswith(text)] if text.startswith("/") else []
        return fitting[state] if state < len(fitting) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    # macOS's Python may have libedit under that name, which binds keys in its own words.
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    if not is_libedit:
        readline.parse_and_bind("set enable-bracketed-paste on")


@contextlib.contextmanager
def _remembered(readline: Any, history: Path | None) -> Iterator[None]:
    """Recall the lines of earlier chats, and add those of this one; a file that cannot be used is left alone."""
    if readline is None or history is None:
        yield
        return
    with contextlib.suppress(OSError, UnicodeError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        readline.set_history_length(_KEPT_LINES)
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            # What was asked is for its owner's eyes alone.
            os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(history)


def history_file() -> Path:
    """Where lines of chats are kept, by the XDG base directories."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "foreroute" / "chat_history"
