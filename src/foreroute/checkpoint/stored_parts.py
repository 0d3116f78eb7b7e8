"""Describe how a family's tensors are made of stored ones, for checkpoints that were published quantised.

A slot holds what the checkpoint stores (blocks, scales, zero points), dequantised when an expert is computed. A
`Coding` says how; kernels/torch/dequantise.py does it.
"""

from dataclasses import dataclass
from typing import Literal

# Prefix of the codings of GGUF's blocks, before the quantisation's name.
GGUF_PREFIX = "gguf:"
# Hugging Face's MXFP4 in blocks as large as ggml's: an exponent, then 32 four-bit floats, two neighbours to a byte.
MXFP4_IN_BLOCKS = "mxfp4-in-blocks"
MXFP4_BLOCK_BYTES = 17


# How gate and up share a matrix of the family: one above the other, or row by row in turn; "" is one matrix, or an
# order that is not known, which then stays one matrix.
Gates = Literal["", "halves", "alternating"]


@dataclass(frozen=True, slots=True)
class FamilyForm:
    """How a family keeps an expert's matrices. is_transposed: as [in, out]. gates: how gate and up are joined."""

    is_transposed: bool = False
    gates: Gates = ""


@dataclass(frozen=True, slots=True)
class Coding:
    """How to dequantise a stored matrix.

    kind: a name that kernels/torch/dequantise.py knows.
    block: rows and columns that share a scale; 0 for all of them.
    is_zero_shifted: zero points are stored one too small (GPTQ's first format).
    order: of blocks with eight rows side by side, the order of their bits (kernels/ggml/interleaved.py); "" for rows
        one after the other.
    """

    kind: str
    block: tuple[int, int] = (0, 0)
    is_zero_shifted: bool = False
    order: str = ""

    @property
    def block_type(self) -> str:
        """ggml's name of the blocks; "" for other codings."""
        return "MXFP4" if self.kind == MXFP4_IN_BLOCKS else self.kind.partition(GGUF_PREFIX)[2]


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One matrix [rows, cols]: its coding, and the positions of its components among an expert's stored parts."""

    coding: Coding
    at: tuple[int, ...]
    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One of the family's tensors of an expert.

    shape: as the family has it. matrices: stacked by rows; none where the tensor is stored unquantised.
    at: its position among the stored parts, if stored unquantised.
    is_transposed: the family's tensor is the matrices' transposition.
    is_interleaved: the matrices' rows alternate, in place of being stacked.
    """

    name: str
    shape: tuple[int, ...]
    matrices: tuple[StoredMatrix, ...] = ()
    at: int = -1
    is_transposed: bool = False
    is_interleaved: bool = False
