"""`foreroute help`: the commands in a few lines, or the help of one; what bare `foreroute` prints too."""

import argparse
from typing import Any

import foreroute
from foreroute.cli.hints import command_hint
from foreroute.errors import ForerouteError

_BEGIN = """\
foreroute {version}: Mixture-of-Experts models whose experts do not fit in memory.

Begin with the model that ships:
  foreroute demo                               see it work, checked
  foreroute chat foreroute-tiny                it adds numbers and days

With a model of yours or of the hub:
  foreroute list                               the models on this machine
  foreroute pull ORG/NAME                      download one
  foreroute plan MODEL                         does it fit, and how fast?
  foreroute generate MODEL "Once upon a time" --memory 8GiB
  foreroute serve MODEL                        OpenAI's and Anthropic's APIs
"""

_EPILOG = """\
examples:
  foreroute help
  foreroute help generate      the same as foreroute generate --help"""


def add_parser(commands: Any) -> None:
    """Add `help` to the commands."""
    parser = commands.add_parser(
        "help",
        help="this overview, or the help of one command",
        usage="foreroute help [COMMAND]",
        description="Show what the commands do, or the help of one of them.",
        epilog=_EPILOG,
    )
    parser.add_argument("topic", metavar="COMMAND", nargs="?", help="the command to explain")
    parser.set_defaults(debug=False, commands=commands)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if args.topic is None:
        print(_overview(args.commands), end="")
        return 0
    parser = args.commands.choices.get(args.topic)
    if parser is None:
        known = args.commands.choices
        hint = command_hint(args.topic, known)
        raise ForerouteError(f"There is no command {args.topic!r}. {hint or 'There are: ' + ', '.join(known) + '.'}")
    parser.print_help()
    return 0


def _overview(commands: Any) -> str:
    lines = [f"  {one.dest:<12}{one.help}" for one in commands._choices_actions]
    begin = _BEGIN.format(version=foreroute.__version__)
    return f"{begin}\nAll commands (foreroute help COMMAND explains one):\n" + "\n".join(lines) + "\n"
