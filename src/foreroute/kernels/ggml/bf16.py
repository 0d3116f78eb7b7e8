"""Products of many rows: blocks become bf16 once, a panel at a time, and torch multiplies them.

With hardware for bf16 a core multiplies so three to five times as fast as ggml's 8-bit products; making the bf16 costs
as much as some dozen rows. From how many rows on it is taken depends on type and CPU alone, never on a clock: two loads
of one model give the same bits.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import inf

import numpy as np
import torch

from foreroute.kernels.ggml.graph import Runner
from foreroute.kernels.ggml.interleaved import ROWS, interleaver
from foreroute.kernels.ggml.types import BlockType
from foreroute.types import round_up

# Rows from which bf16 is quicker, for types that are slow to convert, and for all others. More than the rows of any
# usual batch: while decoding, a row's bits are its own.
_SLOW_FROM = {"Q6_K": 48, "IQ4_NL": 64, "IQ4_XS": 64, "Q3_K": 48, "Q2_K": 48}
_OTHERS_FROM = 24
# Types of more exact numbers than bf16's: rounding them would lose what the file holds.
_FINER = frozenset({"F32", "F16"})
# Whether matrices with eight rows side by side are converted too, by way of rows one after the other; else their
# products of many rows are ggml's own.
INTERLEAVED_IN_BF16 = True
# Weights of a panel: 16 MB of bf16. Rows that are converted at once: their floats stay in the cache.
_PANEL_WEIGHTS = 2**23
_TILE_WEIGHTS = 2**17


@cache
def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def rows_in_bf16(kind: BlockType) -> float:
    """The number of rows from which matrices of this type are multiplied in bf16.

    Infinite for types with finer numbers than bf16, and without hardware for it.
    """
    if kind.name in _FINER or not has_bf16():
        return inf
    return _SLOW_FROM.get(kind.name, _OTHERS_FROM)


class Bf16Products:
    """Multiplies rows by matrices of blocks in bf16, on torch's threads. Not thread-safe.

    Args:
        runner: whose threads convert.
    """

    def __init__(self, runner: Runner) -> None:
        self._library = runner.library
        self._num_threads = runner.num_threads
        self._panel = torch.empty(0, dtype=torch.bfloat16)
        self._tiles = [torch.empty(0, dtype=torch.float32) for _ in range(runner.num_threads)]
        self._workers: ThreadPoolExecutor | None = None

    def __call__(
        self, x: torch.Tensor, kind: BlockType, address: int, shape: tuple[int, int], is_interleaved: bool = False
    ) -> torch.Tensor:
        """Multiply `x` [n, columns] in bf16 by the matrix of `shape` [rows, columns] at `address`: f32 [n, rows].

        is_interleaved: eight of its rows lie side by side.
        """
        rows, columns = shape
        convert = self._convert_interleaved if is_interleaved else self._convert
        out = torch.empty(len(x), rows, dtype=torch.float32, device="cpu")
        panel_rows = _eights(_PANEL_WEIGHTS // columns)
        for first in range(0, rows, panel_rows):
            last = min(rows, first + panel_rows)
            panel = self._converted(convert, kind, address + first * kind.row_bytes(columns), last - first, columns)
            # The matrix first: torch lays out anew what comes second, and the rows are fewer.
            out[:, first:last] = torch.mm(panel, x.t()).t()
        return out

    def _converted(
        self, convert: Callable[..., None], kind: BlockType, address: int, rows: int, columns: int
    ) -> torch.Tensor:
        """These rows in bf16, in memory that is used again."""
        if self._panel.numel() < rows * columns:
            self._panel = _kept(rows * columns, torch.bfloat16)
        panel = self._panel[: rows * columns].view(rows, columns)
        share = _eights(-(-rows // self._num_threads))
        bounds = [(at, min(rows, at + share)) for at in range(0, rows, share)]
        waiting = [
            self._pool().submit(convert, kind, address, panel, span, self._tile(number + 1, columns))
            for number, span in enumerate(bounds[1:])
        ]
        convert(kind, address, panel, bounds[0], self._tile(0, columns))
        for one in waiting:
            one.result()
        return panel

    def _convert(
        self, kind: BlockType, address: int, panel: torch.Tensor, span: tuple[int, int], tile: torch.Tensor
    ) -> None:
        """Convert the rows `span` of the blocks at `address`; ggml's code runs without Python's lock."""
        to_float: Callable[[int, int, int], None] = self._library.to_float(kind.name)
        columns, row_bytes = panel.shape[1], kind.row_bytes(panel.shape[1])
        for first in range(span[0], span[1], len(tile)):
            count = min(len(tile), span[1] - first)
            to_float(address + first * row_bytes, tile.data_ptr(), count * columns)
            panel[first : first + count] = tile[:count]

    def _convert_interleaved(
        self, kind: BlockType, address: int, panel: torch.Tensor, span: tuple[int, int], tile: torch.Tensor
    ) -> None:
        """The same with eight rows side by side; `span` begins and ends at whole eights."""
        columns, row_bytes = panel.shape[1], kind.row_bytes(panel.shape[1])
        rows_of = interleaver(kind.name, columns)
        for first in range(span[0], span[1], len(tile)):
            last = min(span[1], first + len(tile))
            stored = (ctypes.c_uint8 * ((last - first) * row_bytes)).from_address(address + first * row_bytes)
            blocks = rows_of.plain(np.ctypeslib.as_array(stored).reshape(-1, row_bytes))
            self._convert(kind, blocks.ctypes.data, panel[first:last], (0, last - first), tile)

    def _tile(self, number: int, columns: int) -> torch.Tensor:
        rows = _eights(_TILE_WEIGHTS // columns)
        if self._tiles[number].numel() < rows * columns:
            self._tiles[number] = _kept(rows * columns, torch.float32)
        return self._tiles[number][: rows * columns].view(rows, columns)

    def _pool(self) -> ThreadPoolExecutor:
        if self._workers is None:
            self._workers = ThreadPoolExecutor(max(1, self._num_threads - 1), "foreroute-convert")
        return self._workers


def _eights(rows: int) -> int:
    """`rows`, rounded up to whole eights; at least eight."""
    return max(ROWS, round_up(rows, ROWS))


def _kept(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for later calls too: a normal tensor even if this caller's inference mode is on."""
    with torch.inference_mode(False):
        return torch.empty(count, dtype=dtype)
