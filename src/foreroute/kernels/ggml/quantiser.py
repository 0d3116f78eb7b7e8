"""ggml's own quantiser: floats to blocks and back, a row at a time, the same bits on every machine and thread count.

The calls release Python's lock, so that threads quantise at once.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from foreroute.errors import ForerouteError
from foreroute.kernels.ggml.library import Library
from foreroute.kernels.ggml.types import BlockType
from foreroute.transfer.huge_pages import HugePages
from foreroute.transfer.memory import map_memory
from foreroute.types import round_up

# The scales of most types are 16-bit floats; a larger weight, or NaN, would become a scale that is no number.
_MOST = 65504.0
# Weights that are float32 at a time where a whole matrix is quantised.
_PIECE_WEIGHTS = 2**24
_ALIGNMENT = 64
# Memory that is mapped at a time; what is never taken of it is never committed, but for a part of a page.
_CHUNK_BYTES = 2**26


class UnfitWeightError(ForerouteError):
    """A weight that no block can hold: NaN, infinite or larger than 16-bit scales."""


def quantise(library: Library, kind: BlockType, rows: torch.Tensor, out: torch.Tensor) -> None:
    """Quantise `rows` [n, columns], contiguous float32, into `out`, contiguous uint8 [n, bytes of a row].

    Raises:
        UnfitWeightError: a weight that is no number, or too large.
    """
    if kind.name != "F32":
        _check_weights(kind, rows)
    _quantise_checked(library, kind, rows, out)


def quantise_in_threads(
    library: Library, kind: BlockType, rows: torch.Tensor, num_threads: int, memory: "BlockMemory"
) -> torch.Tensor:
    """Quantise `rows` [n, columns] of any float dtype on several threads: uint8 [n, bytes of a row], of `memory`.

    Raises:
        UnfitWeightError: a weight that is no number, or too large.
    """
    count, columns = rows.shape
    blocks = memory.take(count, kind.row_bytes(columns))
    at_once = max(num_threads, _PIECE_WEIGHTS // columns)
    with ThreadPoolExecutor(num_threads) as pool:
        for first in range(0, count, at_once):
            floats = rows[first : first + at_once].float().contiguous()
            _check_weights(kind, floats)
            parts = zip(floats.chunk(num_threads), blocks[first : first + at_once].chunk(num_threads), strict=True)
            list(pool.map(lambda part: _quantise_checked(library, kind, *part), parts))
    return blocks


class BlockMemory:
    """Memory for matrices of blocks, on huge pages: products that walk it are some 5 % quicker than on small ones."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._taken = 0
        self._pages: HugePages | None = None

    def take(self, rows: int, row_bytes: int) -> torch.Tensor:
        """Memory for blocks [rows, row_bytes], aligned to a cache line; kept as long as any taken beside it."""
        nbytes = rows * row_bytes
        if self._pages is None or nbytes > len(self._chunk) - self._taken:
            memory = map_memory(max(nbytes, _CHUNK_BYTES))
            self._chunk, self._taken, self._pages = torch.frombuffer(memory, dtype=torch.uint8), 0, HugePages(memory)
        self._pages.prepare(self._taken, nbytes)
        taken = self._chunk[self._taken : self._taken + nbytes]
        self._taken += round_up(nbytes, _ALIGNMENT)
        return taken.view(rows, row_bytes)


def _check_weights(kind: BlockType, rows: torch.Tensor) -> None:
    low, high = torch.aminmax(rows)
    largest = max(-float(low), float(high))
    if not largest <= _MOST:
        raise UnfitWeightError(f"a weight is {largest}, which the scales of {kind.name} cannot hold")


def _quantise_checked(library: Library, kind: BlockType, rows: torch.Tensor, out: torch.Tensor) -> None:
    count, columns = rows.shape
    assert rows.dtype == torch.float32, f"ggml quantises float32, not {rows.dtype}"
    assert rows.is_contiguous()
    assert out.is_contiguous()
    assert out.shape == (count, kind.row_bytes(columns)), f"{tuple(out.shape)} does not hold {tuple(rows.shape)}"
    if kind.name == "F32":
        out.copy_(rows.view(torch.uint8))
        return
    written = library.ggml_quantize_chunk(kind.number, rows.data_ptr(), out.data_ptr(), 0, count, columns, None)
    assert written == out.nbytes, f"ggml wrote {written} bytes in place of {out.nbytes}"


def dequantise(library: Library, kind: BlockType, blocks: torch.Tensor, columns: int) -> torch.Tensor:
    """Make numbers [n, columns], float32, of `blocks`, contiguous uint8 [n, bytes of a row]."""
    if kind.name == "F32":
        return blocks.view(torch.float32)
    numbers = torch.empty(len(blocks), columns, dtype=torch.float32, device="cpu")
    library.traits(kind.name).to_float(blocks.data_ptr(), numbers.data_ptr(), numbers.numel())
    return numbers
