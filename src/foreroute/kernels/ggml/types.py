"""ggml's tensor types: their numbers in a file, how many weights and bytes a block has, and where its scales are."""

from dataclasses import dataclass

import numpy as np

# Numbers are part of GGUF's format and never reused; names as the gguf package spells them. "F32" is the type of
# activations and biases, "I32" that of ids.
TYPE_NUMBERS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21,
    "IQ2_S": 22, "IQ4_XS": 23, "I32": 26, "IQ1_M": 29, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40,
}  # fmt: skip
F32, I32 = TYPE_NUMBERS["F32"], TYPE_NUMBERS["I32"]
# Those that a matrix may have.
MATRIX_TYPES = tuple(name for name in TYPE_NUMBERS if name != "I32")
# Where the fp16 scales and offsets are in a block.
_HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,),
    "IQ3_S": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "F16": (0,),
}  # fmt: skip
_HALF_EXPONENT, _BF16_EXPONENT, _NO_POWER = 0x7C00, 0x7F80, 0xFF
_BLOCKS_AT_ONCE = 2**20


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of matrices: `weights` in a row share a block of `nbytes`."""

    name: str
    number: int
    weights: int
    nbytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns`, which are whole blocks."""
        assert columns % self.weights == 0, f"{columns} columns are no whole blocks of {self.name}"
        return columns // self.weights * self.nbytes


def has_bad_scale(kind: BlockType, blocks: np.ndarray) -> bool:
    """Whether a scale in `blocks`, uint8 and whole blocks of `kind`, is NaN or infinite.

    ggml's products would not show it: activations are rounded to 8-bit integers before the next product, and what is no
    number becomes some integer there.
    IQ1_M's and NVFP4's are not looked at: those of the first are in pieces, the second's are below infinity.
    """
    rows = blocks.reshape(-1, kind.nbytes)
    return any(
        _is_bad(kind.name, rows[first : first + _BLOCKS_AT_ONCE]) for first in range(0, len(rows), _BLOCKS_AT_ONCE)
    )


def _is_bad(name: str, rows: np.ndarray) -> bool:
    if name == "MXFP4":
        return bool((rows[:, 0] == _NO_POWER).any())
    if name == "BF16":
        return _have_exponent(rows, 0, _BF16_EXPONENT)
    return any(_have_exponent(rows, at, _HALF_EXPONENT) for at in _HALVES.get(name, ()))


def _have_exponent(rows: np.ndarray, at: int, exponent: int) -> bool:
    """Whether one of the 16-bit floats at byte `at` has this greatest exponent."""
    halves = np.ndarray((len(rows),), "<u2", buffer=rows, offset=at, strides=(rows.strides[0],))
    return bool(((halves & exponent) == exponent).any())
