"""For `foreroute pack` without --quant: published four-bit integers in the blocks of ggml's that hold them exactly."""

import argparse
from typing import TYPE_CHECKING

from foreroute.cli import figures, options

if TYPE_CHECKING:
    from foreroute.checkpoint.layouts import ExpertTable
    from foreroute.prepare.quantise import Int4Blocks


def int4_blocks_of(args: argparse.Namespace, table: "ExpertTable") -> "Int4Blocks | None":
    """What writes the experts of `table` in blocks, where blocks hold them; says which layers stay as they are.

    Raises:
        ReadError, ChangedFileError: scales could not be read.
    """
    import torch

    from foreroute.checkpoint.codecs import misfit_for_types
    from foreroute.prepare.quantise import Int4Blocks, find_held

    if all(misfit_for_types(layer) == "other" for layer in table.layers):
        return None
    with figures.counting_bar("reading scales", table.total_slots, "experts", args.json) as show:
        held = find_held(table, show)
    if held.note and not args.json:
        figures.stderr_console().print(held.note)
    if not held.types:
        return None
    options.apply_threads(args)
    return Int4Blocks(table, held.types, torch.get_num_threads())
