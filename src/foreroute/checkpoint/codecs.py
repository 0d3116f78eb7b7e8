"""Storage codecs of experts: unchanged, or quantised to 8 or 4 bits. Sizes and shapes only; quant.py computes.

    int8        one scale per output row
    int4        groups of 32 columns of a row, each with a scale and a zero point; int4-g128: groups of 128

A quantised matrix is stored as [out, in] in every family, as the kernels want it. Biases are unchanged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from foreroute.checkpoint.index import ITEMSIZE
from foreroute.checkpoint.layouts import PART_ALIGNMENT, ExpertLayout, ExpertTable, LayerExperts, Part
from foreroute.errors import StoreError
from foreroute.types import round_up

STORED = "stored"
SCALES = ".scales"
# Dtype of the scales, and in which the kernels compute.
SCALE_DTYPE = "BF16"
# The int4 kernel needs rows in blocks of 16; the int8 kernel columns, else it reads past the end of a row.
_INT4_ROWS, _INT8_COLUMNS = 16, 16


@dataclass(frozen=True)
class Codec:
    """bits per weight; 16 when unchanged. group: columns that share a scale; 0 for a whole row."""

    name: str
    bits: int
    group: int = 0


CODECS = {
    codec.name: codec
    for codec in (Codec(STORED, 16), Codec("int8", 8), Codec("int4", 4, 32), Codec("int4-g128", 4, 128))
}


def encoded_table(table: ExpertTable, codec: Codec, is_transposed: Sequence[bool]) -> ExpertTable:
    """Lay out the experts of `table` as a store of `codec` does, without sources: the store is what is read.

    Args:
        is_transposed: per layer, whether the family stores its matrices as [in, out].
    Raises:
        StoreError: a matrix whose shape the codec cannot take; named, with the codecs that can.
    """
    check_shapes(table, codec, is_transposed)
    layers = tuple(
        LayerExperts(layer.name, layer.num_experts, _layout(layer, codec, transposed), ())
        for layer, transposed in zip(table.layers, is_transposed, strict=True)
    )
    return ExpertTable(layers, table.index)


def described_table(described: Mapping[str, Any], table: ExpertTable) -> ExpertTable | None:
    """Find the layout of `table`'s experts that a quantised store's header, `described`, gives; None if it fits none.

    The header is not trusted but compared with the layouts that the codec can make of these experts: its offsets and
    shapes decide where bytes are written.
    """
    codec, layers = CODECS.get(described["codec"]), described.get("layers")
    if codec is None or not isinstance(layers, list) or len(layers) != len(table.layers):
        return None
    made = [_described_layer(found, layer, codec) for found, layer in zip(layers, table.layers, strict=True)]
    known = tuple(layer for layer in made if layer is not None)
    return ExpertTable(known, table.index) if len(known) == len(made) else None


def _described_layer(found: Any, layer: LayerExperts, codec: Codec) -> LayerExperts | None:
    parts = found.get("parts") if isinstance(found, dict) else None
    for transposed in (False, True):
        layout = _layout(layer, codec, transposed)
        if [{**asdict(part), "shape": list(part.shape)} for part in layout.parts] == parts:
            return LayerExperts(layer.name, layer.num_experts, layout, ())
    return None


def _layout(layer: LayerExperts, codec: Codec, transposed: bool) -> ExpertLayout:
    described: list[tuple[str, tuple[int, ...], str]] = []
    for part in layer.family_layout.parts:
        described += _encoded(part, codec, transposed)
    parts: list[Part] = []
    offset = 0
    for name, shape, dtype in described:
        nbytes = ITEMSIZE[dtype]
        for extent in shape:
            nbytes *= extent
        parts.append(Part(name, offset, nbytes, shape, dtype))
        offset = round_up(offset + nbytes, PART_ALIGNMENT)
    return ExpertLayout(tuple(parts))


def _encoded(part: Part, codec: Codec, transposed: bool) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of each tensor that a part is encoded to."""
    if len(part.shape) == 1:
        return [(part.name, part.shape, SCALE_DTYPE)]
    rows, cols = _rows_and_cols(part, transposed)
    if codec.bits == 8:
        return [(part.name, (rows, cols), "I8"), (part.name + SCALES, (rows,), SCALE_DTYPE)]
    groups = (cols // codec.group, rows, 2)
    return [(part.name, (rows, cols // 2), "U8"), (part.name + SCALES, groups, SCALE_DTYPE)]


def _rows_and_cols(part: Part, transposed: bool) -> tuple[int, int]:
    rows, cols = reversed(part.shape) if transposed else part.shape
    return rows, cols


def check_shapes(table: ExpertTable, codec: Codec, is_transposed: Sequence[bool]) -> None:
    """Check that the codec's kernels can take every matrix of the experts of `table`, stored as `is_transposed` says.

    Raises:
        StoreError: one that they cannot; named, with the codecs that can.
    """
    matrices = [
        (layer.name, part.name, _rows_and_cols(part, transposed))
        for layer, transposed in zip(table.layers, is_transposed, strict=True)
        for part in layer.family_layout.parts
        if len(part.shape) > 1
    ]
    for layer_name, part_name, (rows, cols) in matrices:
        wanted = _not_met(codec, rows, cols)
        if wanted:
            shapes = [shape for _, _, shape in matrices]
            others = [
                other.name
                for other in CODECS.values()
                if other.name != STORED and not any(_not_met(other, *shape) for shape in shapes)
            ]
            instead = f"--quant {' or '.join(others)} can" if others else "No codec here can: pack without --quant"
            raise StoreError(
                f"{codec.name} cannot take {layer_name}.{part_name}, which has {rows} rows and {cols} columns: "
                f"{wanted}. {instead}."
            )


def _not_met(codec: Codec, rows: int, cols: int) -> str:
    """What a matrix [rows, cols] lacks for the codec's kernels; "" where it fits."""
    if codec.bits == 8:
        return f"columns must be whole blocks of {_INT8_COLUMNS}" if cols % _INT8_COLUMNS else ""
    if codec.bits == 4 and (cols % codec.group or rows % _INT4_ROWS):
        return f"columns must be whole groups of {codec.group}, and rows whole blocks of {_INT4_ROWS}"
    return ""
