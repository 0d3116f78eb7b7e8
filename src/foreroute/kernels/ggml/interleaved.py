"""Matrices with eight rows side by side, as ggml's quicker products read them.

llama.cpp makes this form at load, in memory of its own. Here it may lie in a store, and so in the slots. Which types
have it, and how their bits are ordered, depends on the CPU and on ggml's build: a fingerprint tells. All orders move
bits and flip some, so that they are undone by what is found out about each bit.
"""

import ctypes as c
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from foreroute.checkpoint.codecs import ROWS_TOGETHER, orders_of
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.errors import StoreError
from foreroute.kernels.ggml.library import GgmlError, Library, open_library
from foreroute.kernels.ggml.types import BlockType, ContextParams, Tensor

ROWS = ROWS_TOGETHER
_PROBE_BLOCKS = 2
_SLACK_BYTES = 1 << 16
# Bytes are moved by the longest words by which nearly as many of them move whole as one by one.
_WORDS = (np.uint64, np.uint32, np.uint16, np.uint8)
_NEARLY = 0.95


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
        blocks = np.ascontiguousarray(blocks)
        out = np.empty_like(blocks)
        # One of its own: threads convert at once.
        tensor = Tensor.from_buffer_copy(self._tensor.contents)
        tensor.data, tensor.ne[1] = out.ctypes.data, len(blocks)
        tensor.nb[2] = tensor.nb[3] = blocks.nbytes
        self._library.ggml_backend_tensor_set(c.byref(tensor), blocks.ctypes.data, 0, blocks.nbytes)
        return out

    def plain(self, blocks: np.ndarray) -> np.ndarray:
        """Undo `convert`: uint8 [rows, bytes of a row], rows by eights and contiguous.

        Raises:
            GgmlError: this build's order is not one of bits.
        """
        undo = self._undo
        flipped = blocks.reshape(-1, ROWS * self._row_bytes)
        if undo.flips.any():
            flipped = flipped ^ undo.flips
        words = flipped.view(undo.words)
        out = np.take(words, undo.words_from, axis=1, mode="clip").view(np.uint8)
        if len(undo.rest):
            made = np.zeros((len(out), len(undo.rest)), dtype=np.uint8)
            for source, left, right, mask in undo.pieces:
                made |= ((np.take(flipped, source, axis=1, mode="clip") << left) >> right) & mask
            out[:, undo.rest] = made
        return out.reshape(blocks.shape)

    @cached_property
    def _undo(self) -> "_Undo":
        nbytes = ROWS * self._row_bytes

        def bits(group: np.ndarray) -> np.ndarray:
            return np.unpackbits(self.convert(group.reshape(ROWS, -1)).reshape(-1), bitorder="little")

        flips = bits(np.zeros(nbytes, dtype=np.uint8))
        numbers = np.arange(8 * nbytes)
        # Bit k of where each bit came from, by a conversion of the k-th bits of all positions.
        came_from = np.zeros(8 * nbytes, dtype=np.int64)
        for k in range(int(numbers[-1]).bit_length()):
            given = np.packbits((numbers >> k & 1).astype(np.uint8), bitorder="little")
            came_from |= (bits(given) ^ flips).astype(np.int64) << k
        went_to = np.argsort(came_from)
        if not np.array_equal(came_from[went_to], numbers):
            raise GgmlError(f"ggml {self._library.version} orders rows of {self._kind.name} in an unknown way.")
        return _Undo.of(went_to.reshape(nbytes, 8), np.packbits(flips, bitorder="little"))


@dataclass(frozen=True)
class _Undo:
    """How the bytes of eight rows are made of those of the other order, after its `flips`.

    words, words_from: the type of words that are moved, and each one's source. rest: the bytes that are not moved so.
    pieces: (source byte, shift left, shift right, mask) of each of them, to be joined by "or".
    """

    flips: np.ndarray
    words: np.dtype[Any]
    words_from: np.ndarray
    rest: np.ndarray
    pieces: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, went_to: np.ndarray, flips: np.ndarray) -> "_Undo":
        """From where each bit [bytes, 8] has gone to."""
        source = went_to[:, 0] // 8
        whole = (went_to == 8 * source[:, None] + np.arange(8)).all(1)
        for words in _WORDS:
            nbytes = np.dtype(words).itemsize
            froms = source.reshape(-1, nbytes)
            moved = whole.reshape(-1, nbytes).all(1) & (froms == froms[:, :1] + np.arange(nbytes)).all(1)
            moved &= froms[:, 0] % nbytes == 0
            if nbytes * moved.sum() >= _NEARLY * whole.sum():
                break
        rest = np.flatnonzero(~np.repeat(moved, nbytes))
        return cls(flips, np.dtype(words), froms[:, 0] // nbytes, rest, _pieces(went_to[rest]))


def _pieces(went_to: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """See `_Undo`; of bytes whose bits [bytes, 8] have gone there."""
    source, shift = went_to // 8, np.arange(8) - went_to % 8
    left = np.ones(went_to.shape, dtype=bool)
    pieces = []
    while left.any():
        first = left.argmax(1)[:, None]
        its_source, its_shift = (np.take_along_axis(of, first, 1) for of in (source, shift))
        together = left & (source == its_source) & (shift == its_shift)
        left &= ~together
        amounts = (np.maximum(its_shift, 0), np.maximum(-its_shift, 0), together @ (1 << np.arange(8)))
        pieces.append((its_source[:, 0], *(one.reshape(-1).astype(np.uint8) for one in amounts)))
    return pieces


def plain_rows(name: str, blocks: torch.Tensor) -> torch.Tensor:
    """`blocks` of a type, uint8 [rows, bytes of a row] with eight rows side by side, as rows one after the other."""
    kind = open_library().types[name]
    return torch.from_numpy(interleaver(name, blocks.shape[1] // kind.nbytes * kind.weights).plain(blocks.numpy()))


@cache
def orders() -> dict[str, str]:
    """The types of which ggml multiplies rows side by side here, and their orders.

    Raises:
        GgmlError: ggml cannot be used.
    """
    types = open_library().types.values()
    return {kind.name: fingerprint(kind.name) for kind in types if _can_undo(kind)}


def _can_undo(kind: BlockType) -> bool:
    found = interleaver(kind.name, _PROBE_BLOCKS * kind.weights)
    if not found.is_possible:
        return False
    blocks = np.random.default_rng(6).integers(0, 256, (ROWS, _PROBE_BLOCKS * kind.nbytes), dtype=np.uint8)
    try:
        return np.array_equal(found.plain(found.convert(blocks)), blocks)
    except GgmlError:
        return False


def check_orders(table: ExpertTable, path: Path) -> None:
    """Check that this machine has the orders of the rows that lie side by side in the store at `path`.

    Raises:
        StoreError: it has not; named.
    """
    stored = orders_of(table)
    if not stored:
        return
    try:
        known, why = orders(), ""
    except GgmlError as error:
        known, why = {}, f" ({str(error).rstrip('.')})"
    for name, order in stored.items():
        if known.get(name) != order:
            raise StoreError(
                f"{path} was packed for another CPU or build of ggml: its {name} matrices have eight rows side by side "
                f"in the order {order}, and {known.get(name, 'none')} is the one here{why}. "
                "`foreroute pack --force` packs it for this machine, with --layout plain for every machine."
            )


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
