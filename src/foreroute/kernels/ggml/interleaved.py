"""Matrices with eight rows side by side, as ggml's quicker products read them.

llama.cpp makes this form at load, in memory of its own. Here it may lie in a store, and so in the slots. Which types
have it, and how their bits are ordered, depends on the CPU and on ggml's build: a fingerprint tells.
"""

import ctypes as c
from functools import lru_cache

import numpy as np
import xxhash

from foreroute.kernels.ggml.library import Library, open_library
from foreroute.kernels.ggml.structs import ContextParams, Tensor
from foreroute.kernels.ggml.types import BlockType

# Rows that lie side by side in every form of ggml's divide this.
ROWS = 8
_PROBE_BLOCKS = 2
_SLACK_BYTES = 1 << 16


class Interleaver:
    """Converts matrices of one type and width, and marks tensors as converted.

    Args:
        kind: the type. columns: of the matrices.
    Attributes:
        is_possible: this build has the form for this type.
    """

    def __init__(self, library: Library, kind: BlockType, columns: int) -> None:
        self._library, self._kind, self._columns = library, kind, columns
        self._row_bytes = kind.row_bytes(columns)
        self._context = library.ggml_init(ContextParams(1 << 12, None, True))
        self._tensor = library.ggml_new_tensor_2d(self._context, kind.number, columns, ROWS)
        self._buffer = None
        self._extra = None
        buffer_type = library.repack_buffer_type
        if buffer_type is not None:
            self._buffer = library.ggml_backend_buft_alloc_buffer(buffer_type, ROWS * self._row_bytes + _SLACK_BYTES)
            base = library.ggml_backend_buffer_get_base(self._buffer)
            library.ggml_backend_tensor_alloc(self._buffer, self._tensor, base)
            self._extra = self._tensor.contents.extra
        self.is_possible = self._extra is not None

    def mark(self, tensor: "c._Pointer[Tensor]") -> None:
        """Say of a tensor of this type that its memory is interleaved."""
        tensor.contents.buffer, tensor.contents.extra = self._buffer, self._extra

    def convert(self, blocks: np.ndarray) -> np.ndarray:
        """Interleave a matrix: uint8 [rows, bytes of a row], rows by eights; the same shape, another order of bits."""
        assert self.is_possible, "ask before"
        assert len(blocks) % ROWS == 0, "rows come by eights"
        out = np.empty_like(blocks)
        tensor, nbytes = self._tensor.contents, ROWS * self._row_bytes
        for first in range(0, len(blocks), ROWS):
            tensor.data = out[first:].ctypes.data
            self._library.ggml_backend_tensor_set(self._tensor, blocks[first:].ctypes.data, 0, nbytes)
        return out


@lru_cache(maxsize=64)
def interleaver(name: str, columns: int) -> Interleaver:
    """The process's one for a type and a width."""
    library = open_library()
    return Interleaver(library, library.types[name], columns)


@lru_cache(maxsize=32)
def fingerprint(name: str) -> str:
    """Tells the order of bits that this build gives a type: equal texts mean equal orders."""
    kind = open_library().types[name]
    columns = _PROBE_BLOCKS * kind.weights
    blocks = np.random.default_rng(5).integers(0, 256, (ROWS, kind.row_bytes(columns)), dtype=np.uint8)
    return xxhash.xxh3_64_hexdigest(interleaver(name, columns).convert(blocks).tobytes())
