"""Products of many rows: blocks become bf16 once, a panel at a time, and torch multiplies them.

With hardware for bf16 a core multiplies so three to five times as fast as ggml's 8-bit products; making the bf16 costs
as much as some dozen rows. From how many rows on it is taken depends on types, CPU and ggml's build alone, never on a
clock: two loads of one model give the same bits.
"""

import ctypes
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from functools import cache, lru_cache
from math import inf

import numpy as np
import torch

from foreroute.kernels.ggml.interleaved import ROWS, interleaver
from foreroute.kernels.ggml.lanes import Lanes, shared_lanes
from foreroute.kernels.ggml.library import Library
from foreroute.kernels.ggml.types import BlockType
from foreroute.types import round_up

# Nanoseconds of one core (AMD EPYC with AVX-512; python -m benchmarks.block_products --costs) for each weight to become
# bf16, and for each weight and row of a product in blocks, by ggml with AVX2. Only their proportions matter: other CPUs
# have others, and choose a little early or late.
_COSTS = {
    "Q4_0": (0.21, 0.034), "Q4_1": (0.21, 0.032), "Q5_0": (0.64, 0.039), "Q5_1": (0.65, 0.038), "Q8_0": (0.18, 0.026),
    "Q2_K": (0.50, 0.019), "Q3_K": (0.52, 0.030), "Q4_K": (0.19, 0.021), "Q5_K": (0.25, 0.032), "Q6_K": (0.79, 0.024),
    "IQ4_NL": (1.21, 0.033), "IQ4_XS": (0.93, 0.030), "IQ2_XXS": (5.15, 0.049), "IQ2_XS": (2.47, 0.053),
    "IQ2_S": (2.73, 0.053), "IQ3_XXS": (2.47, 0.068), "IQ3_S": (2.63, 0.084), "IQ1_S": (0.37, 0.046),
    "IQ1_M": (0.55, 0.046), "MXFP4": (0.41, 0.062), "NVFP4": (0.61, 0.042), "TQ1_0": (0.29, 0.028),
    "TQ2_0": (0.19, 0.011), "BF16": (0.15, 0.048),
}  # fmt: skip
# The same for a weight and row in bf16, which fewer rows do not reach.
_BF16_COST, _FEWEST = 0.0055, 8
# Builds with AVX-512's 8-bit products take these as quickly as bf16 where rows are many.
_QUICK_WITH_VNNI = frozenset(name for name in _COSTS if name[0] in "QI" and name[-2:] not in ("_0", "_1", "NL"))
# Whether matrices with eight rows side by side are converted too, by way of rows one after the other; else their
# products of many rows are ggml's own.
INTERLEAVED_IN_BF16 = True
# Weights of a panel, 4 MB of bf16, and those that are converted at once: both stay in the cache.
_PANEL_WEIGHTS = 2**21
_TILE_WEIGHTS = 2**19


@cache
def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def rows_in_bf16(matrices: Iterable[tuple[BlockType, int]], library: Library) -> float:
    """The number of rows from which matrices (type, number of weights) are multiplied in bf16, all or none.

    Infinite for types with finer numbers than bf16, without hardware for it, and where `library` is as quick in blocks.
    """
    matrices = list(matrices)
    names = {kind.name for kind, _ in matrices}
    if (
        not names <= _COSTS.keys()
        or not has_bf16()
        or (names & _QUICK_WITH_VNNI and library.ggml_cpu_has_avx512_vnni())
    ):
        return inf
    converting = sum(_COSTS[kind.name][0] * weights for kind, weights in matrices)
    gained = sum((_COSTS[kind.name][1] - _BF16_COST) * weights for kind, weights in matrices)
    return max(_FEWEST, converting / gained)


class Bf16Products:
    """Multiplies rows by matrices of blocks in bf16.

    Args:
        lanes: share a matrix's rows (`__call__`), or compute a product each (`alone`).
    """

    def __init__(self, lanes: Lanes) -> None:
        self.lanes, self._library = lanes, lanes.library
        # Of each thread: the panel and the tile that it used last.
        self._own = threading.local()

    def __call__(self, x: torch.Tensor, kind: BlockType, address: int, shape: tuple[int, int]) -> torch.Tensor:
        """Multiply `x` [n, columns] in bf16 by the matrix of `shape` [rows, columns] at `address`: f32 [n, rows].

        On all lanes. The matrix's rows lie one after the other.
        """
        rows, columns = shape
        out = torch.empty(len(x), rows, dtype=torch.float32, device="cpu")
        share, row_bytes = _eights(-(-rows // self.lanes.count)), kind.row_bytes(columns)
        shares = []
        for first in range(0, rows, share):
            count = min(share, rows - first)
            part = out[:, first : first + count]
            shares.append(self.lanes.submit(self._into, part, x, kind, address + first * row_bytes, (count, columns)))
        try:
            for one in shares:
                one.result()
        finally:
            # After Ctrl-C too: what a lane reads may not be freed under it.
            wait(shares)
        return out

    def alone(
        self, x: torch.Tensor, kind: BlockType, address: int, shape: tuple[int, int], is_interleaved: bool = False
    ) -> torch.Tensor:
        """The same on the calling thread.

        is_interleaved: eight of the matrix's rows lie side by side.
        """
        out = torch.empty(len(x), shape[0], dtype=torch.float32, device="cpu")
        self._into(out, x, kind, address, shape, is_interleaved)
        return out

    def _into(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        kind: BlockType,
        address: int,
        shape: tuple[int, int],
        is_interleaved: bool = False,
    ) -> None:
        rows, columns = shape
        convert = self._convert_interleaved if is_interleaved else self._convert
        panel_rows = _eights(_PANEL_WEIGHTS // columns)
        for first in range(0, rows, panel_rows):
            last = min(rows, first + panel_rows)
            panel = self._kept("panel", (last - first, columns), torch.bfloat16)
            convert(kind, address + first * kind.row_bytes(columns), panel)
            # The rows first: with the panel first a number of rows that is no multiple of 32 takes twice as long.
            out[:, first:last] = torch.mm(x, panel.t())

    def _convert(self, kind: BlockType, address: int, panel: torch.Tensor) -> None:
        """Convert the blocks at `address` into `panel` [rows, columns]; ggml's code runs without Python's lock."""
        to_float: Callable[[int, int, int], None] = self._library.to_float(kind.name)
        columns, row_bytes = panel.shape[1], kind.row_bytes(panel.shape[1])
        tile = self._kept("tile", (_eights(_TILE_WEIGHTS // columns), columns), torch.float32)
        for first in range(0, len(panel), len(tile)):
            count = min(len(tile), len(panel) - first)
            to_float(address + first * row_bytes, tile.data_ptr(), count * columns)
            panel[first : first + count] = tile[:count]

    def _convert_interleaved(self, kind: BlockType, address: int, panel: torch.Tensor) -> None:
        """The same with eight rows side by side."""
        columns, row_bytes = panel.shape[1], kind.row_bytes(panel.shape[1])
        rows_of, at_once = interleaver(kind.name, columns), _eights(_TILE_WEIGHTS // columns)
        for first in range(0, len(panel), at_once):
            some = panel[first : first + at_once]
            stored = (ctypes.c_uint8 * (len(some) * row_bytes)).from_address(address + first * row_bytes)
            blocks = rows_of.plain(np.ctypeslib.as_array(stored).reshape(-1, row_bytes))
            self._convert(kind, blocks.ctypes.data, some)

    def _kept(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the calling thread, for later calls too: normal tensors even if inference mode is on."""
        count = shape[0] * shape[1]
        memory = getattr(self._own, name, None)
        if memory is None or memory.numel() < count:
            with torch.inference_mode(False):
                memory = torch.empty(count, dtype=dtype, device="cpu")
            setattr(self._own, name, memory)
        return memory[:count].view(shape)


@lru_cache(maxsize=8)
def shared_products(num_threads: int) -> Bf16Products:
    """The process's, on as many lanes: models open together share the memory of panels."""
    return Bf16Products(shared_lanes(num_threads))


def _eights(rows: int) -> int:
    """`rows`, rounded up to whole eights; at least eight."""
    return max(ROWS, round_up(rows, ROWS))
