"""How experts are stored: as they are, or quantised to 8 or 4 bits. Sizes and shapes only; kernels/quant.py computes.

    int8        one scale per output row
    int4        groups of 32 columns of a row, each with a scale and a zero point; int4-g128: groups of 128

A quantised matrix is stored as [out, in] whatever the family stores, as the kernels want it. Biases stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from foreroute.checkpoint.index import ITEMSIZE
from foreroute.checkpoint.layouts import PART_ALIGNMENT, ExpertLayout, ExpertTable, LayerExperts, Part, round_up
from foreroute.errors import StoreError

STORED = "stored"
SCALES = ".scales"
# What the kernels take the scales in, and what they compute in.
SCALE_DTYPE = "BF16"
# The int4 kernel takes rows in blocks of so many.
_INT4_ROWS = 16


@dataclass(frozen=True)
class Codec:
    """bits per weight, 16 for as they are. group: columns that share a scale; 0 for a whole row."""

    name: str
    bits: int
    group: int = 0


CODECS = {
    codec.name: codec
    for codec in (Codec(STORED, 16), Codec("int8", 8), Codec("int4", 4, 32), Codec("int4-g128", 4, 128))
}


def encoded_table(table: ExpertTable, codec: Codec, is_transposed: Sequence[bool]) -> ExpertTable:
    """The same experts as they lie in a store of this codec. It has no sources: the store is what is read.

    Args:
        is_transposed: per layer, whether the family stores its matrices as [in, out].
    Raises:
        StoreError: a matrix whose shape the codec cannot take; named.
    """
    layers = []
    for layer, transposed in zip(table.layers, is_transposed, strict=True):
        parts: list[Part] = []
        offset = 0
        for part in layer.layout.parts:
            for name, shape, dtype in _encoded(layer.name, part, codec, transposed=transposed):
                nbytes = ITEMSIZE[dtype]
                for extent in shape:
                    nbytes *= extent
                parts.append(Part(name, offset, nbytes, shape, dtype))
                offset = round_up(offset + nbytes, PART_ALIGNMENT)
        layers.append(LayerExperts(layer.name, layer.num_experts, ExpertLayout(tuple(parts)), ()))
    return ExpertTable(tuple(layers), table.index)


def _encoded(layer: str, part: Part, codec: Codec, *, transposed: bool) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of what a part becomes."""
    if len(part.shape) == 1:
        return [(part.name, part.shape, SCALE_DTYPE)]
    rows, cols = reversed(part.shape) if transposed else part.shape
    if codec.bits == 8:
        return [(part.name, (rows, cols), "I8"), (part.name + SCALES, (rows,), SCALE_DTYPE)]
    if cols % codec.group or rows % _INT4_ROWS:
        raise StoreError(
            f"{codec.name} cannot take {layer}.{part.name}: its {rows} x {cols} numbers are no whole groups of "
            f"{codec.group} columns and {_INT4_ROWS} rows. Take int8, or another group size."
        )
    groups = (cols // codec.group, rows, 2)
    return [(part.name, (rows, cols // 2), "U8"), (part.name + SCALES, groups, SCALE_DTYPE)]
