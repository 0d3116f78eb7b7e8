"""`foreroute completion`: the line for a shell's settings that completes commands, flags and names of models."""

import argparse
import functools
import os
from collections.abc import Collection, Mapping
from typing import Any

from foreroute.cli.settings.file import read_config_file
from foreroute.cli.settings.flags import settable
from foreroute.errors import ForerouteError

SHELLS = ("bash", "zsh", "fish")
# Set by the shell's function when it asks for completions.
_VARIABLE = "_ARGCOMPLETE"

_EPILOG = """\
examples:
  eval "$(foreroute completion bash)"           now, or in ~/.bashrc
  eval "$(foreroute completion zsh)"            in ~/.zshrc, behind compinit
  foreroute completion fish | source            in ~/.config/fish/config.fish

Commands, flags, their choices, and for MODEL the names of `foreroute list` are
completed, besides files. It needs: pip install 'foreroute[completion]'."""


def add_parser(commands: Any) -> None:
    """Add `completion` to the commands."""
    parser = commands.add_parser(
        "completion",
        help="complete commands and flags in bash, zsh or fish",
        usage="foreroute completion {bash,zsh,fish}",
        description="Print what makes a shell complete foreroute's commands, flags and models.",
        epilog=_EPILOG,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    parser.set_defaults(debug=False)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code.

    Raises:
        ForerouteError: argcomplete is not installed.
    """
    try:
        import argcomplete
    except ImportError as error:
        raise ForerouteError("Completion needs argcomplete: pip install 'foreroute[completion]'") from error
    print(argcomplete.shellcode(["foreroute"], shell=args.shell))
    return 0


def answer_shell(parser: argparse.ArgumentParser, commands: Any) -> None:
    """Answer a shell that asks for completions, and end the process; return at once where none asks."""
    if _VARIABLE not in os.environ:
        return
    import argcomplete

    for one in commands.choices.values():
        for action in one._actions:
            if action.dest == "model" and not action.option_strings:
                action.completer = functools.partial(_models, _aliases(commands.choices))
    argcomplete.autocomplete(parser, always_complete_options=False)


def _aliases(commands: Mapping[str, argparse.ArgumentParser]) -> Collection[str]:
    """The names of the config file's aliases; none where it is wrong, which the command itself will say."""
    try:
        return read_config_file({name: settable(one) for name, one in commands.items()}).aliases
    except ForerouteError:
        return ()


def _models(aliases: Collection[str], prefix: str, **_: Any) -> list[str]:
    """The names of models that begin with `prefix`, and files."""
    from argcomplete.completers import FilesCompleter

    from foreroute.cli.models.cached import named_models

    names = [*aliases, *(one.name for one in named_models())]
    return [*(name for name in names if name.startswith(prefix)), *FilesCompleter()(prefix)]
