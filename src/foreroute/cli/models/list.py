"""`foreroute list`: the models that can be named: those that ship, and those in the hub's cache."""

import argparse
from typing import Any

from foreroute.checkpoint.hub.fetch import HubAccess
from foreroute.cli import figures, options
from foreroute.cli.models.cached import NamedModel, aliased_models, named_models
from foreroute.units import format_memory

_EPILOG = """\
examples:
  foreroute list
  foreroute list --json

The names stand for MODEL in every command; so do paths of folders and of .gguf
files, which are not listed. Whether a model is a Mixture-of-Experts model that
can be run is said by `foreroute show MODEL`. The hub's cache is that of
huggingface_hub (HF_HOME); `foreroute rm` removes models from it. A path gets a
name in the section [aliases] of the config file: big = "/data/big.gguf"."""


def add_parser(commands: Any) -> None:
    """Add `list` to the commands."""
    parser = commands.add_parser(
        "list",
        help="list the models on this machine that have a name",
        usage="foreroute list [flags]",
        description="List the config file's aliases, the models that ship, and the hub's cache.",
        epilog=_EPILOG,
    )
    options.add_common_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    found = [*aliased_models(args.aliases), *named_models()]
    cache = HubAccess().cache
    if args.json:
        figures.print_json(
            models=[
                {"name": one.name, "path": str(one.path), "bytes": one.nbytes, "format": one.kind or None,
                 "family": one.family or None, "where": one.where, "whole": one.is_whole, "beside": one.beside}
                for one in found
            ],
            cache=str(cache),
        )  # fmt: skip
        return 0
    console = figures.stdout_console()
    figures.print_rows(console, [(one.name, format_memory(one.nbytes), _remark(one)) for one in found])
    if not any(one.where == "hub cache" for one in found):
        console.print(f"\nNone is in the hub's cache ({cache}): foreroute pull ORG/NAME downloads one.", soft_wrap=True)
    return 0


def _remark(one: NamedModel) -> str:
    parts = [part for part in (one.kind, one.family, one.where) if part]
    if not one.is_whole:
        parts.append("not on this machine" if not one.kind else "not whole: pull it again")
    return ", ".join([*parts, *one.beside])
