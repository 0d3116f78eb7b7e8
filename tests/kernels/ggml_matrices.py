"""Random matrices in ggml's blocks, and what they mean, for tests."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from foreroute.kernels.ggml.library import open_library
from foreroute.kernels.ggml.types import MATRIX_TYPES, BlockType

_DISTINCT = 12


@dataclass(frozen=True)
class Blocks:
    """A matrix: `blocks` uint8 [rows, bytes of a row], and its `numbers` f32 [rows, columns]."""

    kind: BlockType
    blocks: np.ndarray
    numbers: np.ndarray

    @property
    def columns(self) -> int:
        return self.numbers.shape[1]


def some_blocks(kind: BlockType, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random blocks of a matrix [rows, bytes of a row] whose numbers are all finite.

    No byte is above 63, so that whatever it is a part of, fp16, bf16 or a power of two, is below 2. Not by ggml's
    quantiser, which takes seconds to begin with some types.
    """
    return np.random.default_rng(seed).integers(0, 64, (rows, kind.row_bytes(columns)), dtype=np.uint8)


@lru_cache(maxsize=256)
def random_blocks(name: str, rows: int, columns: int, seed: int = 0) -> Blocks:
    """Normal weights of a spread that keeps products near 1, quantised by ggml; rows repeat.

    Types whose quantiser takes seconds to begin have random bytes.
    """
    if rows > _DISTINCT:
        few = random_blocks(name, _DISTINCT, columns, seed)
        at = np.random.default_rng(seed).integers(0, _DISTINCT, rows)
        return Blocks(few.kind, few.blocks[at], few.numbers[at])
    library = open_library()
    kind = library.types[name]
    weights = np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32) * columns**-0.5
    if name == "F32":
        return Blocks(kind, weights.view(np.uint8), weights)
    blocks = some_blocks(kind, rows, columns, seed)
    if not name.startswith(("IQ1", "IQ2", "IQ3")):
        library.ggml_quantize_chunk(kind.number, weights.ctypes.data, blocks.ctypes.data, 0, rows, columns, None)
    numbers = np.empty((rows, columns), dtype=np.float32)
    library.to_float(name)(blocks.ctypes.data, numbers.ctypes.data, numbers.size)
    return Blocks(kind, blocks, numbers)


def types() -> list[str]:
    """Every type of matrices that this build has."""
    return [name for name in MATRIX_TYPES if name in open_library().types]


def random_rows(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Normal activations [rows, columns], f32."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The difference's size as a share of the expected one's."""
    return float((found - expected).norm() / expected.norm())
