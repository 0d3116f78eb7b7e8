"""Are the scales in a matrix's blocks numbers?

ggml's products would not show it: activations are rounded to 8-bit integers before the next product, and what is no
number becomes some integer there.
"""

import numpy as np

from foreroute.kernels.ggml.types import BlockType

# Where the fp16 scales and offsets are in a block.
_HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,),
    "IQ3_S": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "F16": (0,),
}  # fmt: skip
_HALF_EXPONENT, _BF16_EXPONENT, _NO_POWER = 0x7C00, 0x7F80, 0xFF
_BLOCKS_AT_ONCE = 2**20


def has_bad_scale(kind: BlockType, blocks: np.ndarray) -> bool:
    """Whether a scale in `blocks`, uint8 and whole blocks of `kind`, is NaN or infinite.

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
