"""For `foreroute pack --dense`: dense weights in blocks, behind the experts of the store."""

import argparse
from typing import TYPE_CHECKING, Any

from foreroute.cli import figures, options
from foreroute.types import QUANTISED_TYPES
from foreroute.units import format_memory

if TYPE_CHECKING:
    from foreroute.checkpoint.records import DenseRecords
    from foreroute.model.build.skeleton import Outline
    from foreroute.prepare.quantise import DenseQuantiser

DENSE_TYPES = tuple(kind.lower() for kind in QUANTISED_TYPES)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add --dense."""
    parser.add_argument(
        "--dense", choices=DENSE_TYPES, metavar="TYPE",
        help="put the dense weights into the store too, quantised: linear layers, embedding and output, but no norms, "
        f"biases and routers; of safetensors. One of {', '.join(DENSE_TYPES)} (default: no)",
    )  # fmt: skip


def quantiser_of(args: argparse.Namespace, sketch: "Outline") -> "DenseQuantiser | None":
    """What quantises the dense weights of `sketch`, if that is asked for; says so where they are quantised already.

    Raises:
        UnsupportedModelError: they cannot be in that type. GgmlError: ggml cannot be had.
    """
    if args.dense is None:
        return None
    import torch

    from foreroute.kernels.ggml.known_answers import check_types
    from foreroute.kernels.ggml.library import open_library
    from foreroute.loading.block_kernels import dense_type, format_of_dense
    from foreroute.prepare.quantise import DenseQuantiser

    options.apply_threads(args)
    library = open_library()
    kind = dense_type(args.dense.upper(), sketch, library)
    check_types(library, [kind.name])
    if (form := format_of_dense(sketch)) is not None and not args.json:
        figures.stderr_console().print(
            f"Dense weights of this checkpoint are quantised already ({form.name}), and --dense {args.dense} "
            "quantises them a second time."
        )
    return DenseQuantiser(sketch, kind, library, torch.get_num_threads())


def described(dense: "DenseRecords") -> str:
    """The dense weights of a store in a few words, after its experts; "" without."""
    if not dense.kind:
        return ""
    return f", dense weights in {dense.kind.lower()} ({len(dense.shapes)} matrices, {format_memory(sum(dense.nbytes))})"


def as_json(dense: "DenseRecords") -> dict[str, Any] | None:
    """The same as figures; None without."""
    if not dense.kind:
        return None
    return {"type": dense.kind.lower(), "matrices": len(dense.shapes), "bytes": sum(dense.nbytes)}
