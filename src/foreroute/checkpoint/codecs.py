"""Codecs of packed stores: experts as they are, or quantised to GGUF's blocks. Sizes and shapes only; ggml quantises.

A quantised matrix is stored as rows of blocks, [out, in] in every family, gate and up one after the other; biases are
stored as float32. Such a store is the same bytes on every machine.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from foreroute.checkpoint.gguf_file import EXPERT_BLOCKS
from foreroute.checkpoint.layouts import PART_ALIGNMENT, ExpertLayout, ExpertTable, LayerExperts, Part
from foreroute.checkpoint.stored_parts import GGUF_PREFIX, Coding, FamilyForm, StoredMatrix, StoredPart
from foreroute.errors import StoreError
from foreroute.types import QUANTISED_TYPES, round_up

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
_DOWN, _GATE_UP = "down_proj", "gate_up_proj"


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
    form = layer.form
    stored: list[Part] = []
    parts: list[StoredPart] = []
    offset = 0
    for part in layer.family_layout.parts:
        is_bias = len(part.shape) == 1
        rows, columns = (part.shape[0], 1) if is_bias else _rows_and_columns(part, form)
        kind = "F32" if is_bias else codec.kind_of(part.name, at, num_layers)
        count = 2 if form.gates and part.name.startswith(_GATE_UP) else 1
        weights, nbytes = EXPERT_BLOCKS[kind]
        shape = (rows // count, columns // weights * nbytes)
        matrices = []
        for which in range(count):
            matrices.append(StoredMatrix(Coding(GGUF_PREFIX + kind), (len(stored),), shape[0], columns))
            stored.append(Part(f"{part.name}.{which}", offset, shape[0] * shape[1], shape, "U8"))
            offset = round_up(offset + stored[-1].nbytes, PART_ALIGNMENT)
        parts.append(
            StoredPart(
                part.name,
                part.shape,
                tuple(matrices),
                is_transposed=form.is_transposed and not is_bias,
                is_interleaved=count == 2 and form.gates == "alternating",
            )
        )
    return LayerExperts(
        layer.name, layer.num_experts, ExpertLayout(tuple(stored)), (), tuple(parts), codec.name, form=form
    )


def _rows_and_columns(part: Part, form: FamilyForm) -> tuple[int, int]:
    rows, columns = reversed(part.shape) if form.is_transposed else part.shape
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
