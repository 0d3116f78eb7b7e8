"""`foreroute pull`: download a model of the hub into its cache, only the files that are read here."""

import argparse
from pathlib import Path
from typing import Any

from foreroute.cli import figures, options
from foreroute.units import format_memory

_EPILOG = """\
examples:
  foreroute pull ORG/NAME
  foreroute pull ORG/NAME:Q4_K_M         of its GGUF files, this quantisation
  foreroute pull ORG/NAME --revision main

Other commands download a hub id by themselves; this one does nothing else. The
files go to huggingface_hub's cache (HF_HOME); HF_TOKEN, HF_ENDPOINT and proxies
work as everywhere. Files that came whole are kept when a download stops; one
that was cut off begins anew."""


def add_parser(commands: Any) -> None:
    """Add `pull` to the commands."""
    parser = commands.add_parser(
        "pull",
        help="download a model of the hub",
        usage="foreroute pull ORG/NAME[:QUANT] [flags]",
        description="Download a model of the hub, or find out that it is here.",
        epilog=_EPILOG,
    )
    options.add_model(parser)
    options.add_common_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    path = options.find_model(args)
    nbytes = _weight_bytes(path)
    if args.json:
        figures.print_json(model=args.model, path=str(path), bytes=nbytes)
        return 0
    print(f"{args.model} is here: {format_memory(nbytes)} of weights in {path}")
    print(f"Next: foreroute show {args.model}, foreroute plan {args.model}, foreroute chat {args.model}")
    return 0


def _weight_bytes(path: Path) -> int:
    from foreroute.checkpoint.locate import read_index

    return read_index(path).nbytes
