"""The command `foreroute`: parse, dispatch, and turn errors and Ctrl-C into one line and an exit code."""

import argparse
import codecs
import contextlib
import io
import os
import signal
import sys
import threading
import traceback
import types
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import foreroute
from foreroute.cli.commands import (
    bench,
    chat,
    demo,
    evaluate,
    fit,
    generate,
    help,
    pack,
    plan,
    replay,
    run,
    score,
    serve,
    verify,
)
from foreroute.cli.hints import command_hint, flag_hint
from foreroute.cli.machine import doctor
from foreroute.cli.models import list as list_models
from foreroute.cli.models import pull, rm, show
from foreroute.cli.settings.shown import print_settings
from foreroute.cli.settings.sources import parse_command
from foreroute.cli.terminal import completion
from foreroute.errors import ForerouteError
from foreroute.loading.wording import as_flags

COMMANDS = {
    "run": run, "generate": generate, "chat": chat, "serve": serve, "plan": plan, "pack": pack, "fit": fit,
    "score": score, "eval": evaluate, "verify": verify, "bench": bench, "replay": replay, "demo": demo,
    "list": list_models, "pull": pull, "show": show, "rm": rm, "doctor": doctor,
    "completion": completion, "help": help,
}  # fmt: skip
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_TERMINATED = 143  # 128 + SIGTERM
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

_DESCRIPTION = """\
Runs Mixture-of-Experts models whose experts do not fit in memory. Experts stay
on disk; a pool of the size that you set keeps those in use, and those that the
next layer will probably need are prefetched. MODEL is the folder of a Hugging
Face checkpoint (safetensors), a .gguf file, a name that `foreroute list` shows,
or a hub id: org/name, or org/name:Q4_K_M for one of its GGUF files."""

_EPILOG = """\
Start with these:
  foreroute demo                                        see it work, checked
  foreroute plan MODEL --memory 8GiB                    what would fit, how fast
  foreroute generate MODEL "Once upon a time"           text, and what it took

`foreroute COMMAND --help` explains a command, and its figures; where it has many
flags, --help-all lists them all. Flags can be set in foreroute/config.toml of
$XDG_CONFIG_HOME or ~/.config, and by FOREROUTE_ variables: COMMAND --print-config
says where each value came from.
Exit codes: 0 done; 1 verify, bench or demo found a difference,
or doctor a problem;
2 an error, explained in one line; 130 stopped by Ctrl-C, 143 by SIGTERM."""


class _Parser(argparse.ArgumentParser):
    """Of the command or of one of its commands: shows descriptions with their line breaks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)


class _MainParser(_Parser):
    """Names what was meant where a command or a flag is not known, with the usage of the command."""

    commands: Any = None

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; none of its own flags begins with a command."""
        given = [*(sys.argv[1:] if args is None else args)]
        known = self.commands.choices
        if given and not given[0].startswith("-") and given[0] not in known:
            hint = command_hint(given[0], known)
            self.error(f"there is no command {given[0]!r}. {hint or 'There are: ' + ', '.join(known) + '.'}")
        if given and given[0] in known:
            parsed, unknown = parse_command(given[0], given[1:], known)
        else:
            parsed, unknown = self.parse_known_args(given, namespace)
        if unknown:
            self._refuse(unknown, known.get(getattr(parsed, "command", None), self))
        return parsed

    @staticmethod
    def _refuse(unknown: Sequence[str], parser: argparse.ArgumentParser) -> NoReturn:
        hint = flag_hint(unknown, parser)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"\n{hint}" if hint else ""))


def build_parser() -> _MainParser:
    """Build the parser of all commands. Cheap: neither torch nor transformers is imported."""
    parser = _MainParser(prog="foreroute", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"foreroute {foreroute.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for command in COMMANDS.values():
        command.add_parser(commands)
    parser.commands = commands
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse's own errors exit with 2."""
    _write_utf8()
    given = sys.argv[1:] if argv is None else argv
    try:
        parser = build_parser()
        completion.answer_shell(parser, parser.commands)
        args = parser.parse_args(given or ["help"])
    except ForerouteError as error:  # of a setting
        print(f"foreroute: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    with _termination_interrupts() as terminated, as_flags():
        code = _run(args)
    return EXIT_TERMINATED if terminated and code == EXIT_INTERRUPTED else code


def _run(args: argparse.Namespace) -> int:
    try:
        is_shown = getattr(args, "print_config", False)
        code: int = print_settings(args) if is_shown else COMMANDS[args.command].run(args)
        # Flush here, so that a reader that has closed the pipe is noticed.
        sys.stdout.flush()
    except ForerouteError as error:
        if args.debug:
            traceback.print_exc()
        print(f"foreroute: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("\nforeroute: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout again at exit: redirect that to nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return code


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[list[int]]:
    """End a command on SIGTERM as on Ctrl-C, so that no half-written file is left; the list then gets an entry."""
    came: list[int] = []

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    is_ours = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if is_ours:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _write_utf8() -> None:
    """Make output work for any text: use UTF-8 where the locale (C, POSIX) knows only ASCII.

    Bytes of a path that are not text are shown as escapes. Another encoding that was asked for stays.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding="utf-8" if is_ascii else None, errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
