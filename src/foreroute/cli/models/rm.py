"""`foreroute rm`: remove a model from the hub's cache, or packed stores from beside a model, after asking."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.checkpoint.hub.fetch import HubAccess
from foreroute.checkpoint.locate import locate
from foreroute.cli import figures, options
from foreroute.errors import ForerouteError
from foreroute.units import format_memory

if TYPE_CHECKING:
    from foreroute.cli.models.remove import Removal

_EPILOG = """\
examples:
  foreroute rm ORG/NAME                  all that the hub's cache has of it
  foreroute rm ORG/NAME:Q4_K_M           of its GGUF files, this quantisation
  foreroute rm MODEL --packed q4_k       a packed store that `pack` made
  foreroute rm MODEL --packed all --yes

It says how many bytes are freed, and asks; --yes does not ask. What a process
has open, or a download or `foreroute pack` writes, is not removed, and nothing
outside the hub's cache but packed stores is."""


def add_parser(commands: Any) -> None:
    """Add `rm` to the commands."""
    parser = commands.add_parser(
        "rm",
        help="remove a model from the hub's cache, or its packed stores",
        usage="foreroute rm MODEL [--packed NAME] [flags]",
        description="Remove a model from the hub's cache, or packed stores beside a model.",
        epilog=_EPILOG,
    )
    options.add_model(parser)
    parser.add_argument(
        "--packed",
        metavar="NAME",
        help='remove this packed store beside the model in its place: q4_k and so on, "auto" for the one of its own '
        'bytes, or "all"',
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    options.add_common_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    removal = _removal(args)
    from foreroute.cli.models.remove import processes_using, tells_users

    users = processes_using(removal.files)
    if users:
        raise ForerouteError(
            f"{removal.what} is in use by process {', '.join(map(str, users))}. End it first, and then remove it."
        )
    if not tells_users():
        print("This system does not say which programs use it: end those that do, first.", file=sys.stderr)
    if not args.yes and not _may_remove(args, removal):
        print("Nothing was removed.", file=sys.stderr)
        return 0
    try:
        removal.execute()
    except OSError as error:
        what = error.filename or removal.what
        raise ForerouteError(f"{what} could not be removed: {error.strerror}. End the programs that use it.") from error
    left = [path for path in removal.files if path.exists()]
    if left:
        raise ForerouteError(f"{left[0]} could not be removed. Look at the permissions of its folder.")
    if args.json:
        figures.print_json(model=args.model, removed=[str(path) for path in removal.files], bytes=removal.nbytes)
    else:
        print(f"Removed {removal.what}: {format_memory(removal.nbytes)} are free again.")
    return 0


def _removal(args: argparse.Namespace) -> "Removal":
    from foreroute.cli.models.remove import of_cache, of_stores

    model = options.alias_target(args, args.model)
    cached_alone = HubAccess(local_files_only=True)
    if args.packed is None:
        return of_cache(model, args.revision, cached_alone.cache)
    path: Path = locate(model, revision=args.revision, quiet=True, access=cached_alone)
    return of_stores(path, args.packed, args.model)


def _may_remove(args: argparse.Namespace, removal: "Removal") -> bool:
    """Ask on the terminal.

    Raises:
        ForerouteError: there is none to ask on.
    """
    told = f"{removal.what}: {format_memory(removal.nbytes)} in {len(removal.files)} files"
    if args.json or not sys.stdin.isatty():
        raise ForerouteError(f"This would remove {told}. Add --yes to do so without being asked.")
    print(f"Remove {told}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
