"""`--print-config`: the value of every flag of a command, and where it came from; nothing is run."""

import argparse

from foreroute.cli import figures
from foreroute.cli.settings.file import config_path
from foreroute.cli.settings.flags import shown
from foreroute.cli.settings.sources import FlagValue

_TYPED = "typed"


def print_settings(args: argparse.Namespace) -> int:
    """Print the settings of the command that `args` are of; return the exit code."""
    settings: tuple[FlagValue, ...] = args.settings
    path = args.config_file
    if getattr(args, "json", False):
        figures.print_json(
            command=args.command,
            config_file=None if path is None else str(path),
            settings=[
                {"name": one.key, "value": shown(one.key, one.value), "source": one.source, "origin": one.origin}
                for one in settings
            ],
            aliases=dict(args.aliases),
        )
        return 0
    console = figures.stdout_console()
    would_be = config_path()
    absent = "there is none" if would_be is None else f"there is none; it would be {would_be}"
    console.print(f"config file: {path or absent}", soft_wrap=True, markup=False)
    width = max(len(one.key) for one in settings)
    for one in settings:
        value = shown(one.key, one.value)
        text = "-" if value is None else str(value).lower() if isinstance(value, bool) else value
        where = {"flag": _TYPED, "default": "default"}.get(one.source, one.origin)
        console.print(f"{one.key:<{width}}  {text}  ({where})", soft_wrap=True, markup=False)
    return 0
