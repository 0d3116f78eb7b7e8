"""`foreroute pack`: write every expert as one aligned record, so that later runs read it straight into a slot."""

import argparse
import itertools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.checkpoint.codecs import CODECS, QUANTS, STORED, encoded_table, interleaved, orders_of
from foreroute.cli import figures, options, pack_dense, pack_quantised
from foreroute.errors import StoreError
from foreroute.units import format_memory
from foreroute.whole_files import beside

if TYPE_CHECKING:
    from foreroute.checkpoint.layouts import ExpertTable
    from foreroute.checkpoint.records import DenseRecords, PackedStore
    from foreroute.model.build.skeleton import Outline
    from foreroute.prepare.quantise import DenseQuantiser, Int4Blocks, Quantiser
    from foreroute.whole_files import Claim

# What `--layout auto` is: "interleaved" where it can be, or "plain".
AUTO_LAYOUT = "interleaved"

_EPILOG = """\
examples:
  foreroute pack MODEL                    beside MODEL: used automatically
  foreroute pack MODEL --out /fast/disk   use: generate ... --packed /fast/disk
  foreroute pack MODEL --quant q4_k       use: generate ... --packed q4_k
  foreroute pack MODEL --quant q4_k --text book.txt   and what it costs
  foreroute pack MODEL --quant q4_k --dense q8_0
                                    use: generate ... --packed q4_k-dense-q8_0

In a checkpoint an expert is several tensors at unaligned offsets. In the store
it is one aligned read, straight into the slot where it is computed.
The checkpoint is not changed, and is still needed: tokenizer, config and
weights that are not in the store are read from it. The store takes as much
disk as all experts; the free space is checked first. It gets its name when it
is complete, and every record has a checksum.
--quant makes the store smaller, and every read as much faster: q8_0 by half
beside bfloat16, q4_k to 28 %. These are llama.cpp's types, quantised by ggml
and computed by its kernels, the same numbers on every machine. q4_k_m has
the down matrices of half of the layers in q6_k, as llama.cpp's Q4_K_M has. The
output changes, so such a store is used only where --packed asks for it. The
error printed is that of a layer's products, as a share of them; with --text,
perplexity and bits per character on that text show the effect on the output,
beside the model as stored. A checkpoint that is quantised already is quantised
a second time by it; without --quant its experts stay as they are. Four-bit
integers (GPTQ, AWQ, compressed-tensors) are written in the blocks of ggml's
that hold them exactly: q4_0 where all zero points are 8, else q4_1 or q5_0.
Matrices in blocks are written with eight rows side by side where ggml has
quicker kernels for that here (on most x86: q4_0, q4_k, iq4_nl, mxfp4). Such a
store is for this kind of CPU and this ggml, and not for a GPU; another machine
refuses it. --layout plain writes one for every machine. The numbers are the
same, and plain rows can be made of it again.
--dense quantises the weights that every token uses, into the same store:
linear layers, embedding and output, which q8_0 makes half as large as bfloat16
does, in RAM and in what is read of it for each token. Norms, biases and routers
stay floats. The output changes as with --quant. generate --dense makes the same
of the checkpoint at every load. A GGUF file's dense weights stay in its own
blocks, four-bit integers in those that hold them: --dense refuses both.
A run that crashed or was killed is continued. Ctrl-C removes what was written,
unless --keep-partial: then the next `pack` continues there."""


def add_parser(commands: Any) -> None:
    """Add `pack` to the commands."""
    parser = commands.add_parser(
        "pack",
        help="write experts to one file, so that later runs read faster",
        usage="foreroute pack MODEL [flags]",
        description="Write a packed store: one page-aligned record per expert.",
        epilog=_EPILOG,
    )
    options.add_model(parser)
    parser.add_argument("--out", type=Path, metavar="PATH", help="file or folder (default: beside the checkpoint)")
    parser.add_argument(
        "--quant", type=_quant, metavar="TYPE", help=f"quantise the experts: {', '.join(QUANTS)} (default: no)"
    )
    pack_dense.add_option(parser)
    parser.add_argument(
        "--layout", choices=("auto", "plain", "interleaved"), default="auto",
        help="of matrices in blocks: rows one after the other, or eight side by side (default: "
        f"{AUTO_LAYOUT} without a GPU, where this machine has kernels for it)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="continue a partial file (default: yes)"
    )
    parser.add_argument("--keep-partial", action="store_true", help="on Ctrl-C, keep what was written")
    parser.add_argument("--force", action="store_true", help="pack again, even where a store exists")
    pack_quantised.add_options(parser)
    options.add_common_options(parser)


def _quant(name: str) -> str:
    if name not in QUANTS and name not in pack_quantised.RENAMED:
        raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(QUANTS)})")
    return name


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    pack_quantised.refuse_misfits(args)
    folder = options.find_model(args)
    options.quiet_libraries(args)
    with figures.busy("Reading the checkpoint's headers", args.json):
        from foreroute.checkpoint.codecs import check_shapes
        from foreroute.checkpoint.locate import read_index
        from foreroute.checkpoint.records import PackedStore, packed_as, store_name
        from foreroute.model.build.skeleton import outline
        from foreroute.model.build.stored_names import tell

        sketch = outline(folder, read_index(folder))
        tell(sketch.notes, folder)
        pack_quantised.choose_codec(args, sketch)
        codec = args.quant or STORED
        check_shapes(sketch.table, CODECS[codec])
        dense = pack_dense.quantiser_of(args, sketch)
        quality = pack_quantised.quality_of(args, folder, sketch)
    packed, name = packed_as(codec, args.dense), store_name(codec, args.dense)
    path = options.place_beside(folder, name, args.out)
    existed, quantiser = _write(args, sketch, path, dense)
    measured = quantiser if quantiser is not None and quantiser.is_measured else None
    store = PackedStore(path, sketch.table)
    if not args.json:
        _tell(store, packed, existed=existed, is_beside=path == beside(folder, name))
        if measured is not None:
            _tell_errors(measured)
    found = quality.price(path)
    if args.json:
        _tell_json(store, packed, measured, found, existed=existed, is_beside=path == beside(folder, name))
    elif found is not None:
        pack_quantised.tell_quality(found, packed)
    return 0


def _write(
    args: argparse.Namespace, sketch: "Outline", path: Path, dense: "DenseQuantiser | None"
) -> "tuple[bool, Quantiser | None]":
    """Write the store, unless it exists already: whether it did, and what quantised its experts.

    Raises: as `_orders`, `_is_ours`, `_check_room` and `pack`.
    """
    from foreroute.checkpoint.quantised_layout import in_blocks
    from foreroute.checkpoint.records import NO_DENSE
    from foreroute.checkpoint.store_writer import claim_store

    table, records = sketch.table, NO_DENSE if dense is None else dense.records
    held = _held(args, path, table)
    # Where that moves bytes only, records lie as ggml's kernels multiply them.
    exact = in_blocks(table) if held is None else held.table
    orders = _orders(args, exact if args.quant is None else encoded_table(table, CODECS[args.quant]))
    existed, quantiser = _is_ours(args, path, table, orders, records), None
    if not existed:
        with claim_store(path) as claim:
            # Another `pack` may have finished just now.
            existed = _is_ours(args, path, table, orders, records)
            if not existed:
                quantiser = _quantiser(args, sketch)
                _check_room(path, exact if quantiser is None else quantiser.table, records)
                source = table if quantiser or held else exact
                _pack(args, source, path, quantiser or held, orders, dense, claim)
    return existed, quantiser


def _held(args: argparse.Namespace, path: Path, table: "ExpertTable") -> "Int4Blocks | None":
    """What writes published four-bit integers in blocks that hold them; None where there are none, or nothing to do."""
    from foreroute.cli.pack_exact import int4_blocks_of

    is_done = path.exists() and not args.force and args.layout == "auto"
    return None if args.quant is not None or is_done else int4_blocks_of(args, table)


def _orders(args: argparse.Namespace, table: "ExpertTable") -> dict[str, str]:
    """The types whose matrices in `table` are to have eight rows side by side, and this machine's orders of them.

    Raises:
        GgmlError, StoreError: that was asked for, and no matrix can have it.
    """
    import torch

    # A GPU's kernels read rows one after the other.
    auto = "plain" if torch.cuda.is_available() else AUTO_LAYOUT
    if args.layout == "plain" or (args.layout == "auto" and auto == "plain"):
        return {}
    from foreroute.kernels.ggml.interleaved import orders
    from foreroute.kernels.ggml.library import GgmlError

    try:
        known = orders()
    except GgmlError:
        if args.layout == "auto":
            return {}
        raise
    found = orders_of(interleaved(table, known))
    if args.layout == "interleaved" and not found:
        names = ", ".join(name.lower() for name in known) or "no type"
        raise StoreError(
            f"--layout interleaved: ggml has it here for {names}, with rows by eights, and no matrix of the experts is "
            "such a one. Leave --layout out."
        )
    return found


def _quantiser(args: argparse.Namespace, sketch: "Outline") -> "Quantiser | None":
    """Build the experts' quantiser, if one is needed."""
    if args.quant is None:
        return None
    import torch

    from foreroute.kernels.ggml.known_answers import check_types
    from foreroute.kernels.ggml.library import open_library
    from foreroute.prepare.quantise import Quantiser

    options.apply_threads(args)
    codec, library = CODECS[args.quant], open_library()
    check_types(library, codec.kinds)
    return Quantiser(sketch.table, codec, library, num_threads=torch.get_num_threads())


def _tell_errors(quantiser: "Quantiser") -> None:
    console = figures.stdout_console()
    errors = [error.relative for error in quantiser.errors]
    worst = max(range(len(errors)), key=errors.__getitem__)
    mean = sum(errors) / len(errors)
    console.print(
        f"Error of a layer's products, as a share of them: {100 * mean:.2f} % on average, "
        f"{100 * errors[worst]:.2f} % in MoE layer {worst} ({quantiser.measured} experts of each layer)."
    )


def _is_ours(
    args: argparse.Namespace, path: Path, table: "ExpertTable", orders: dict[str, str], dense: "DenseRecords"
) -> bool:
    """Whether `path` is a complete store of this very model, codec and layout; for "auto", one that this machine reads.

    Raises:
        StoreError: the file is something else, and is not overwritten unless asked.
    """
    from foreroute.checkpoint.records import PackedStore
    from foreroute.kernels.ggml.interleaved import check_orders

    if args.force or not path.exists():
        return False
    try:
        found, codec = PackedStore(path, table), args.quant or STORED
        if found.codec != codec:
            raise StoreError(f"{path} holds {found.codec} experts, not {codec}.")
        if found.dense != dense:
            ours, theirs = (one.kind.lower() or "none" for one in (dense, found.dense))
            raise StoreError(f"{path} holds other dense weights than --dense asks for: {theirs}, not {ours}.")
        if args.layout != "auto" and orders_of(found.table) != orders:
            raise StoreError(f"{path} has experts in another layout than --layout {args.layout} has on this machine.")
    except StoreError as error:
        raise StoreError(f"{error} --force packs over it.") from error
    if args.layout == "auto":
        check_orders(found.table, path)
    return True


def _check_room(path: Path, table: "ExpertTable", dense: "DenseRecords") -> None:
    """Raise StoreError when the disk has no room for the store; the bytes of a partial file count as free."""
    from foreroute.checkpoint.records import partial_path
    from foreroute.system.writing import allocated_bytes

    needed = table.total_slots * table.slot_bytes + sum(dense.nbytes)
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise StoreError(f"{path.parent} cannot be written to: {error.strerror}. Choose another --out.") from error
    if partial_path(path).exists():
        free += allocated_bytes(partial_path(path))
    if needed > free:
        raise StoreError(
            f"{path} needs {format_memory(needed, round_up=True)}; its disk has {format_memory(free)} free. "
            "Make room, or choose another --out. Nothing was written."
        )


def _pack(
    args: argparse.Namespace,
    table: "ExpertTable",
    path: Path,
    quantiser: "Quantiser | Int4Blocks | None",
    orders: dict[str, str],
    dense: "DenseQuantiser | None",
    claim: "Claim",
) -> None:
    from rich import progress

    from foreroute.checkpoint.records import partial_path
    from foreroute.prepare.pack import pack

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = figures.stderr_console()
    # Bytes by the number of records that are done.
    nbytes = [table.slot_bytes] * table.total_slots + ([] if dense is None else dense.records.nbytes)
    done_bytes = [0, *itertools.accumulate(nbytes)]
    with progress.Progress(*columns, console=console, disable=args.json) as bar:
        task = bar.add_task("packing", total=done_bytes[-1])
        is_first = True

        def show(done: int, total: int) -> None:
            nonlocal is_first
            if is_first and done and not args.json:
                what = "experts" if dense is None else "experts and dense matrices"
                console.print(f"Continuing a partial file: {done} of {total} {what} are done.")
            is_first = False
            bar.update(task, completed=done_bytes[done])

        try:
            pack(
                table, path, progress=show, resume=args.resume, keep_partial=args.keep_partial, quantiser=quantiser,
                orders=orders, dense=dense, claim=claim,
            )  # fmt: skip
        except KeyboardInterrupt:
            # Also when Ctrl-C came before `pack` had begun, or twice.
            if not args.keep_partial:
                claim.discard()
            claim.close()
            if partial_path(path).exists() and not args.json:
                console.print(f"Kept {partial_path(path)}: `foreroute pack` continues there.")
            raise


def _tell(store: "PackedStore", packed: str, *, existed: bool, is_beside: bool) -> None:
    """Say what was written. packed: the store's name for --packed beside the checkpoint; "" where it needs none."""
    path = store.path
    size = f"{store.table.total_slots} experts, {format_memory(path.stat().st_size)}"
    if orders := orders_of(store.table):
        size += f", eight rows of {' and '.join(sorted(orders))} side by side"
    size += pack_dense.described(store.dense)
    if existed:
        print(f"{path} is complete and belongs to this model ({size}): nothing to do. --force packs it again.")
    else:
        print(f"Wrote {path}: {size}.")
    if packed:
        print(f"Use it with --packed {packed if is_beside else path}")
        return
    print("It is used automatically, as it is beside the checkpoint." if is_beside else f"Use it with --packed {path}")


def _tell_json(
    store: "PackedStore",
    packed: str,
    quantiser: "Quantiser | None",
    quality: "dict[str, Any] | None",
    *,
    existed: bool,
    is_beside: bool,
) -> None:
    figures.print_json(
        path=str(store.path),
        store_bytes=store.path.stat().st_size,
        experts=store.table.total_slots,
        codec=store.codec,
        layout="interleaved" if orders_of(store.table) else "plain",
        existed=existed,
        dense=pack_dense.as_json(store.dense),
        found_automatically=is_beside and not packed,
        layer_errors=None if quantiser is None else [error.relative for error in quantiser.errors],
        quality=quality,
    )
