"""`foreroute pack`: write every expert as one aligned record, so that later runs read it straight into its place."""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.checkpoint.locate import locate
from foreroute.cli import figures, options
from foreroute.errors import StoreError
from foreroute.residency.budget import format_memory

if TYPE_CHECKING:
    from foreroute.checkpoint.layouts import ExpertTable

_EPILOG = """\
examples:
  foreroute pack MODEL                    beside the checkpoint: found by itself
  foreroute pack MODEL --out /fast/disk   use: generate ... --packed /fast/disk

In a checkpoint an expert is several tensors, which lie where no aligned read
can begin. In the store it is one read, straight to where it is computed.
The checkpoint stays as it is, and stays needed: tokenizer, config and dense
weights are read from it. The store takes the room of all experts once more;
that is checked first. It gets its name when it is whole, and every record
carries a checksum.
A run that crashed is continued. Ctrl-C removes what was written, unless
--keep-partial: then the next `pack` goes on there."""


def add_parser(commands: Any) -> None:
    """Add `pack` to the commands."""
    parser = commands.add_parser(
        "pack",
        help="make later runs faster: one read per expert",
        usage="foreroute pack MODEL [flags]",
        description="Write a packed store: one page-aligned record per expert.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or a hub id")
    parser.add_argument("--out", type=Path, metavar="PATH", help="file or folder (default: beside the checkpoint)")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="continue a partial file (default: yes)"
    )
    parser.add_argument("--keep-partial", action="store_true", help="on Ctrl-C, keep what was written")
    parser.add_argument("--force", action="store_true", help="pack again, even where a store is there")
    options.add_common_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    folder = locate(args.model)
    options.quiet_libraries(args)
    with figures.busy("Reading the checkpoint's headers", args.json):
        from foreroute.checkpoint.index import read_index
        from foreroute.checkpoint.records import STORE_NAME
        from foreroute.model.skeleton import outline

        table = outline(folder, read_index(folder)).table
    path = folder / STORE_NAME if args.out is None else args.out.expanduser()
    if path.is_dir():
        path = path / STORE_NAME
    is_there = not args.force and _is_ours(path, table)
    if not is_there:
        _check_room(path, table)
        _pack(args, table, path)
    _tell(args, table, path, is_there=is_there, is_beside=path == folder / STORE_NAME)
    return 0


def _is_ours(path: Path, table: "ExpertTable") -> bool:
    """Is there a complete store of this very model?

    Raises:
        StoreError: there is a file, but it is something else: it is not overwritten unasked.
    """
    from foreroute.checkpoint.records import PackedStore

    if not path.exists():
        return False
    try:
        PackedStore(path, table)
    except StoreError as error:
        raise StoreError(f"{error} --force packs over it.") from error
    return True


def _check_room(path: Path, table: "ExpertTable") -> None:
    """Raises StoreError when the disk has no room for the store; the room of a partial file counts as free."""
    from foreroute.checkpoint.records import partial_path

    needed = table.total_slots * table.slot_bytes
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise StoreError(f"{path.parent} cannot be written to: {error.strerror}. Choose another --out.") from error
    if partial_path(path).exists():
        free += partial_path(path).stat().st_blocks * 512
    if needed > free:
        raise StoreError(
            f"{path} needs {format_memory(needed, round_up=True)}; its disk has {format_memory(free)} free. "
            "Make room, or choose another --out. Nothing was written."
        )


def _pack(args: argparse.Namespace, table: "ExpertTable", path: Path) -> None:
    from rich import progress

    from foreroute.checkpoint.records import partial_path
    from foreroute.engine.packing import pack

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = figures.stderr_console()
    with progress.Progress(*columns, console=console, disable=args.json) as bar:
        task = bar.add_task("packing", total=table.total_slots * table.slot_bytes)
        is_first = True

        def show(done: int, total: int) -> None:
            nonlocal is_first
            if is_first and done and not args.json:
                console.print(f"Continuing a partial file: {done} of {total} experts are there.")
            is_first = False
            bar.update(task, completed=done * table.slot_bytes)

        try:
            pack(table, path, progress=show, resume=args.resume, keep_partial=args.keep_partial)
        except KeyboardInterrupt:
            # Also where Ctrl-C came before `pack` had begun, or twice.
            if not args.keep_partial:
                partial_path(path).unlink(missing_ok=True)
            elif partial_path(path).exists() and not args.json:
                console.print(f"Kept {partial_path(path)}: `foreroute pack` goes on there.")
            raise


def _tell(args: argparse.Namespace, table: "ExpertTable", path: Path, *, is_there: bool, is_beside: bool) -> None:
    nbytes = path.stat().st_size
    if args.json:
        figures.print_json(
            path=str(path),
            store_bytes=nbytes,
            experts=table.total_slots,
            was_there=is_there,
            found_automatically=is_beside,
        )
        return
    size = f"{table.total_slots} experts, {format_memory(nbytes)}"
    if is_there:
        print(f"{path} is complete and belongs to this model ({size}): nothing to do. --force packs it again.")
    else:
        print(f"Wrote {path}: {size}.")
    print("It is used by itself, as it lies beside the checkpoint." if is_beside else f"Use it with --packed {path}")
