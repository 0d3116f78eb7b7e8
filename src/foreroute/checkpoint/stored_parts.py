"""How a family's tensors are made of stored ones, for checkpoints whose weights are quantised as they were published.

A slot holds what the checkpoint stores (blocks, scales, zero points); numbers are made of it when an expert is
computed. Which numbers, says a `Coding`; kernels/torch/dequantise.py turns it into them.
"""

from dataclasses import dataclass

# Codings of GGUF's blocks are named so, with the quantisation's name behind it.
GGUF_PREFIX = "gguf:"


@dataclass(frozen=True, slots=True)
class Coding:
    """What a stored matrix needs to become numbers.

    kind: a name that kernels/torch/dequantise.py knows.
    block: rows and columns that share a scale; 0 for all of them.
    is_zero_shifted: zero points are stored one too small (GPTQ's first format).
    """

    kind: str
    block: tuple[int, int] = (0, 0)
    is_zero_shifted: bool = False


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

    shape: as the family has it. matrices: one below the other; none where the tensor is stored as it is.
    at: its position among the stored parts, where it is stored as it is.
    is_transposed: the family's tensor is the matrices' transposition.
    is_interleaved: the matrices' rows take turns, in place of one matrix below the other.
    """

    name: str
    shape: tuple[int, ...]
    matrices: tuple[StoredMatrix, ...] = ()
    at: int = -1
    is_transposed: bool = False
    is_interleaved: bool = False
