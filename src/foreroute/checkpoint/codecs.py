"""Codecs and layouts of packed stores: experts as they are, or quantised to GGUF's blocks. Sizes and shapes only.

A quantised matrix is stored as rows of blocks, [out, in] in every family, gate and up one after the other; biases are
stored as float32. Such a store is the same bytes on every machine, unless eight rows of a matrix lie side by side, in
the order of one build of ggml.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from foreroute.checkpoint.assembly import GGUF_PREFIX, Coding, FamilyForm, StoredMatrix, StoredPart
from foreroute.checkpoint.gguf_file import EXPERT_BLOCKS
from foreroute.checkpoint.layouts import ExpertTable, LayerExperts, Part, Placing
from foreroute.checkpoint.quantised_formats import AWQ_INT4, GPTQ_INT4, GPTQ_REORDERED, PACKED_INT4
from foreroute.errors import StoreError
from foreroute.types import QUANTISED_TYPES

STORED = "stored"
# What llama.cpp takes for rows that are no whole blocks of 256; here it is advice.
_SMALLER = {
    "Q2_K": "iq4_nl", "Q3_K": "iq4_nl", "IQ4_XS": "iq4_nl", "Q4_K": "q5_0", "Q5_K": "q5_1", "Q6_K": "q8_0",
}  # fmt: skip
# Codecs of earlier versions, computed by torch's kernels: the one to take in their place, and the one for rows that
# are no whole blocks of it.
EARLIER: Mapping[str, tuple[str, ...]] = {
    "int8": ("q8_0",), "int4": ("q4_k", "q4_1"), "int4-g128": ("q4_k", "q4_1"), "mixed": ("q4_k", "q4_1"),
}  # fmt: skip
# ggml's types that hold four-bit integers of published formats exactly, smallest first (kernels/torch/int4_blocks.py).
INT4_TYPES = ("Q4_0", "Q4_1", "Q5_0")
_INT4_WEIGHTS = 32
# The codings of such integers.
INT4_CODINGS = frozenset({PACKED_INT4, GPTQ_INT4, GPTQ_REORDERED, AWQ_INT4})
_DOWN, _GATE_UP = "down_proj", "gate_up_proj"
# Rows that lie side by side, in every build's orders.
ROWS_TOGETHER = 8


@dataclass(frozen=True)
class Codec:
    """kind: the type of every matrix; "" when unchanged. more: that of down matrices in `_has_more`'s layers."""

    name: str
    kind: str = ""
    more: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """All its types of blocks."""
        return (self.kind, self.more) if self.more else (self.kind,)

    def kind_of(self, part: str, layer: int, num_layers: int) -> str:
        """The type of the family's matrix `part` in MoE layer `layer` of `num_layers`."""
        return self.more if self.more and part == _DOWN and _has_more(layer, num_layers) else self.kind


CODECS = {
    codec.name: codec
    for codec in (
        Codec(STORED),
        *(Codec(kind.lower(), kind) for kind in QUANTISED_TYPES),
        Codec("q4_k_m", "Q4_K", "Q6_K"),
    )
}
QUANTS = tuple(name for name in CODECS if name != STORED)


def _has_more(layer: int, num_layers: int) -> bool:
    """Layers whose down matrices get more bits: the first and the last eighth, and every third between them.

    Source: llama.cpp, src/llama-quant.cpp, use_more_bits, by which its Q4_K_M chooses Q6_K for ffn_down. Layers are
    counted among MoE layers.
    """
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def encoded_table(table: ExpertTable, codec: Codec) -> ExpertTable:
    """Lay out the experts of `table` as a store of `codec` does, without sources: the store is what is read.

    Raises:
        StoreError: a matrix whose rows are no whole blocks; named, with the codecs that can take it.
    """
    check_shapes(table, codec)
    layers = tuple(_encoded(layer, codec, at, len(table.layers)) for at, layer in enumerate(table.layers))
    return ExpertTable(layers, table.index)


def describe(layer: LayerExperts) -> dict[str, Any]:
    """A layer as a store's header has it: of a quantised one also how its parts make the family's tensors."""
    found: dict[str, Any] = {
        "name": layer.name,
        "num_experts": layer.num_experts,
        "parts": [{**asdict(part), "shape": list(part.shape)} for part in layer.layout.parts],
    }
    for matrix in _stored_matrices(layer):
        if matrix.coding.order:
            found["parts"][matrix.at[0]]["order"] = matrix.coding.order
    if layer.parts and not layer.sources:  # of a codec, not of a published format
        found["tensors"] = [
            {
                "name": part.name,
                "is_transposed": part.is_transposed,
                "is_interleaved": part.is_interleaved,
                "blocks": [matrix.coding.kind.removeprefix(GGUF_PREFIX) for matrix in part.matrices],
            }
            for part in layer.parts
        ]
    return found


def _encoded(layer: LayerExperts, codec: Codec, at: int, num_layers: int) -> LayerExperts:
    form, placing = layer.form, Placing()
    parts: list[StoredPart] = []
    for part in layer.family_layout.parts:
        is_bias = len(part.shape) == 1
        rows, columns = (part.shape[0], 1) if is_bias else _rows_and_columns(part, form)
        kind = "F32" if is_bias else codec.kind_of(part.name, at, num_layers)
        count = 2 if form.gates and part.name.startswith(_GATE_UP) else 1
        weights, nbytes = EXPERT_BLOCKS[kind]
        shape = (rows // count, columns // weights * nbytes)
        matrices = []
        for which in range(count):
            place = placing.add(f"{part.name}.{which}", shape, "U8")
            matrices.append(StoredMatrix(Coding(GGUF_PREFIX + kind), (place,), shape[0], columns))
        parts.append(
            StoredPart(
                part.name,
                part.shape,
                tuple(matrices),
                is_transposed=form.transposes(part.name) and not is_bias,
                is_interleaved=count == 2 and form.gates == "alternating",
            )
        )
    return LayerExperts(layer.name, layer.num_experts, placing.layout, (), tuple(parts), codec.name, form=form)


def in_types(table: ExpertTable, types: Mapping[str, Mapping[str, str]]) -> ExpertTable:
    """Lay out published integers of `table` in blocks of ggml's that hold them exactly, without sources.

    Args:
        types: by layer and family's matrix, one of `INT4_TYPES`. Layers that are not named stay as they are.
    """
    layers = tuple(_in_types(layer, types[layer.name]) if layer.name in types else layer for layer in table.layers)
    return table if layers == table.layers else replace(table, layers=layers, _reads={})


def misfit_for_types(layer: LayerExperts) -> str:
    """Why no type of `INT4_TYPES` can hold a layer's matrices, by their codings and shapes; "" where one may.

    "other": they are no four-bit integers of a published format.
    """
    matrices = _stored_matrices(layer)
    kinds = {matrix.coding.kind for matrix in matrices}
    are_whole = all(part.matrices or len(part.shape) == 1 for part in layer.parts)
    if not kinds or not are_whole or not kinds <= INT4_CODINGS:
        return "other"
    return next((why for matrix in matrices if (why := int4_misfit(matrix.coding, matrix.cols))), "")


def int4_misfit(coding: Coding, columns: int) -> str:
    """Why no type of `INT4_TYPES` can hold a matrix of `columns` in this `coding`; "" where one may, by its numbers."""
    if coding.kind == GPTQ_REORDERED:
        return "columns in another order (g_idx)"
    group = min(coding.block[1] or columns, columns)
    for extent, what in ((columns, "rows"), (group, "groups")):
        if extent % _INT4_WEIGHTS:
            return f"{what} of {extent} weights, which are no whole blocks of {_INT4_WEIGHTS}"
    return ""


def _in_types(layer: LayerExperts, types: Mapping[str, str]) -> LayerExperts:
    if misfit_for_types(layer) or {part.name for part in layer.parts if part.matrices} != types.keys():
        return layer
    placing = Placing()
    parts: list[StoredPart] = []
    for part in layer.parts:
        matrices = []
        for which, matrix in enumerate(part.matrices):
            weights, nbytes = EXPERT_BLOCKS[types[part.name]]
            at = placing.add(f"{part.name}.{which}", (matrix.rows, matrix.cols // weights * nbytes), "U8")
            scales = layer.layout.parts[matrix.at[1]].dtype
            coding = Coding(GGUF_PREFIX + types[part.name], rounded_to="" if scales == "F32" else scales)
            matrices.append(replace(matrix, coding=coding, at=(at,)))
        plain = None if part.matrices else layer.layout.parts[part.at]
        at_itself = -1 if plain is None else placing.add(plain.name, plain.shape, plain.dtype)
        parts.append(replace(part, at=at_itself, matrices=tuple(matrices)))
    return replace(layer, layout=placing.layout, sources=(), parts=tuple(parts))


def retype(table: ExpertTable, layers: Any) -> ExpertTable:
    """`in_types` by the types that the `layers` of a store's header name; what makes no sense there is left out."""
    found: dict[str, dict[str, str]] = {}
    for layer in layers if isinstance(layers, list) else ():
        tensors = layer.get("tensors") if isinstance(layer, dict) else None
        described = [one for one in tensors if isinstance(one, dict)] if isinstance(tensors, list) else []
        blocks = {str(one.get("name")): one.get("blocks") for one in described if one.get("blocks")}
        types = {name: kinds[0] for name, kinds in blocks.items() if isinstance(kinds, list)}
        if types and all(kind in INT4_TYPES for kind in types.values()):
            found[str(layer.get("name"))] = types
    return in_types(table, found)


def types_in(table: ExpertTable) -> dict[str, dict[str, str]]:
    """The types by which `in_types` laid out the experts of `table`."""
    return {
        layer.name: {part.name: part.matrices[0].coding.block_type for part in layer.parts if part.matrices}
        for layer in table.layers
        if layer.parts and not layer.sources
    }


def orders_of(table: ExpertTable) -> dict[str, str]:
    """Types of blocks that have eight rows side by side in `table`, and the order of their bits."""
    codings = {matrix.coding for layer in table.layers for matrix in _stored_matrices(layer)}
    return {coding.block_type: coding.order for coding in codings if coding.order}


def interleaved(table: ExpertTable, orders: Mapping[str, str]) -> ExpertTable:
    """Lay out the experts of `table` with eight rows of a matrix side by side where `orders` (by type) has its type.

    Gate and up whose rows alternate are taken apart for it. Matrices whose rows are no whole eights, or not known to be
    gate and up, stay as they are.
    """
    layers = tuple(_interleaved(layer, orders) for layer in table.layers)
    return table if layers == table.layers else replace(table, layers=layers, _reads={})


def _interleaved(layer: LayerExperts, orders: Mapping[str, str]) -> LayerExperts:
    placing = Placing()

    def place(part: Part, suffix: str = "", count: int = 1) -> int:
        return placing.add(part.name + suffix, (part.shape[0] // count, *part.shape[1:]), part.dtype)

    parts = []
    for part in layer.parts:
        matrices: list[StoredMatrix] = []
        for matrix in part.matrices:
            order = orders.get(matrix.coding.block_type, "")
            pieces = _pieces(part, matrix, layer.form) if order else 0
            coding = replace(matrix.coding, order=order) if pieces else matrix.coding
            for which in range(pieces or 1):
                suffix = f".{which}" if pieces > 1 else ""
                at = tuple(place(layer.layout.parts[one], suffix, pieces or 1) for one in matrix.at)
                matrices.append(replace(matrix, coding=coding, at=at, rows=matrix.rows // (pieces or 1)))
        at_itself = -1 if part.matrices else place(layer.layout.parts[part.at])
        is_interleaved = part.is_interleaved or len(matrices) > len(part.matrices)
        parts.append(replace(part, at=at_itself, matrices=tuple(matrices), is_interleaved=is_interleaved))
    return replace(layer, layout=placing.layout, parts=tuple(parts)) if layer.parts else layer


def _pieces(part: StoredPart, matrix: StoredMatrix, form: FamilyForm) -> int:
    """Into how many matrices one is taken apart for eight rows side by side; 0 where it must stay."""
    if len(part.matrices) > 1 or not part.name.startswith(_GATE_UP):
        return int(matrix.rows % ROWS_TOGETHER == 0)
    # Gate and up, each of which has to be whole eights.
    if not form.gates or matrix.rows % (2 * ROWS_TOGETHER):
        return 0
    return 2 if form.gates == "alternating" else 1


def _stored_matrices(layer: LayerExperts) -> list[StoredMatrix]:
    return [matrix for part in layer.parts for matrix in part.matrices]


def _rows_and_columns(part: Part, form: FamilyForm) -> tuple[int, int]:
    rows, columns = reversed(part.shape) if form.transposes(part.name) else part.shape
    return rows, columns


def _matrices(layer: LayerExperts) -> list[tuple[str, int]]:
    """Name and columns of every matrix."""
    parts = layer.family_layout.parts
    return [(part.name, _rows_and_columns(part, layer.form)[1]) for part in parts if len(part.shape) == 2]


def check_shapes(table: ExpertTable, codec: Codec) -> None:
    """Check that rows of every matrix of `table` are whole blocks of the codec's types.

    Raises:
        StoreError: one whose rows are not; named, with the codecs that can take all of them.
    """
    for layer in table.layers:
        for name, columns in _matrices(layer):
            kind = _misfit(codec, name, columns)
            if kind:
                raise StoreError(
                    f"{codec.name} cannot take {layer.name}.{name}: its rows have {columns} weights, which are no "
                    f"whole blocks of {EXPERT_BLOCKS[kind][0]}. {_instead(table, kind)}"
                )


def _misfit(codec: Codec, name: str, columns: int) -> str:
    """The codec's type of which these columns are no whole blocks; "" where they fit."""
    kinds = codec.kinds if name == _DOWN else (codec.kind,)
    return next((kind for kind in kinds if kind and columns % EXPERT_BLOCKS[kind][0]), "")


def codecs_that_fit(table: ExpertTable) -> list[str]:
    """Names of the codecs that can take every matrix of `table`."""
    matrices = {one for layer in table.layers for one in _matrices(layer)}
    return [name for name in QUANTS if not any(_misfit(CODECS[name], *one) for one in matrices)]


def _instead(table: ExpertTable, kind: str) -> str:
    others = codecs_that_fit(table)
    if not others:
        return "No type here can: pack without --quant."
    named = _SMALLER.get(kind, "")
    advice = f" (llama.cpp takes {named} in its place)" if named in others else ""
    return f"--quant {', '.join(others[:-1])} or {others[-1]} can{advice}."
