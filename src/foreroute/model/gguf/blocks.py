"""Keep the dense matrices of a GGUF file in its own blocks: which can be, reading them, and the bytes of all."""

import math
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from foreroute.checkpoint.gguf_file import GgufIndex
from foreroute.checkpoint.source_files import SourceFile
from foreroute.errors import CorruptCheckpointError
from foreroute.kernels.ggml.linear import BlockMatrix, BlockProducts
from foreroute.kernels.ggml.quantiser import BlockMemory
from foreroute.kernels.ggml.types import BlockType, has_bad_scale
from foreroute.model.gguf.tensors import GgufNames, GgufTensor

_EMBEDDING = "model.embed_tokens.weight"
# Floats of torch's own: norms, biases, routers.
_PLAIN = "F32"
# Of a matrix, what a thread of its own reads.
_LEAST_SHARE_BYTES = 2**20


class GgufMatrices:
    """The matrices of a GGUF file, as they are stored: see `MatrixSource`."""

    embedding = _EMBEDDING

    def __init__(self, index: GgufIndex, names: GgufNames, products: BlockProducts) -> None:
        self._index, self._types, self._memory = index, products.library.types, BlockMemory()
        self._config = names.config
        self._stored = {
            ours: tensor for ours, tensor in names.dense.items() if is_kept(index, tensor, names.config, products)
        }

    @property
    def names(self) -> Collection[str]:
        """See `MatrixSource`."""
        return self._stored

    def read(self, name: str, state: Mapping[str, Any]) -> BlockMatrix:
        """See `MatrixSource`."""
        tensor, memory = self._stored[name], self._memory
        kind = self._types[self._index.kinds[tensor.stored[0]]]
        columns = tensor.shape[1]
        if tensor.change is None:
            return BlockMatrix(kind, columns, self._read(tensor.stored[0], kind, memory))
        parts = [self._read(stored, kind, BlockMemory()) for stored in tensor.stored]
        blocks = memory.take(tensor.shape[0], kind.row_bytes(columns))
        return BlockMatrix(kind, columns, blocks.copy_(tensor.change.make(parts, self._config)))

    def _read(self, stored: str, kind: BlockType, memory: BlockMemory) -> torch.Tensor:
        rows, columns = self._index.shapes[stored]
        return _read(self._index, stored, kind, memory.take(rows, kind.row_bytes(columns)))


def is_kept(index: GgufIndex, tensor: GgufTensor, config: Any, products: BlockProducts) -> bool:
    """Whether a dense parameter is a matrix whose rows are stored, in a type that ggml multiplies, not plain floats."""
    first, *others = tensor.stored
    kind = products.library.types.get(index.kinds[first])
    has_rows = len(tensor.shape) == 2 and all(len(index.shapes[name]) == 2 for name in tensor.stored)
    if not has_rows or kind is None or kind.name == _PLAIN or any(index.kinds[name] != kind.name for name in others):
        return False
    change, columns = tensor.change, tensor.shape[1]
    if change is not None and change.of_columns:
        columns //= getattr(config, change.of_columns)
    elif change is not None and not change.of_rows:
        return False
    return columns % kind.weights == 0


def dense_block_nbytes(index: GgufIndex, names: GgufNames, products: BlockProducts) -> int:
    """Bytes of the dense weights when matrices stay in blocks and all else is in f32."""
    return sum(
        sum(index.tensors[name].nbytes for name in tensor.stored)
        if is_kept(index, tensor, names.config, products)
        else 4 * math.prod(tensor.shape)
        for tensor in names.dense.values()
    )


def _read(index: GgufIndex, name: str, kind: BlockType, blocks: torch.Tensor) -> torch.Tensor:
    """Read the stored bytes into `blocks` [rows, bytes of a row], which are returned."""
    entry, row_bytes = index.tensors[name], blocks.shape[1]
    assert blocks.nbytes == entry.nbytes, f"{name} has {entry.nbytes} bytes in place of {blocks.nbytes}"

    def read(first: int, last: int) -> bool:
        """Read these rows; whether they have a bad scale."""
        span = blocks[first:last].view(-1).numpy()
        with SourceFile(entry.path, index.files.get(entry.path)) as file:
            file.read_into(entry.offset + first * row_bytes, span.data)
        return has_bad_scale(kind, span)

    # Copies from the page cache, and memory that is touched for the first time, take a core each.
    threads = max(1, min(torch.get_num_threads(), blocks.nbytes // _LEAST_SHARE_BYTES))
    bounds = [len(blocks) * at // threads for at in range(threads + 1)]
    if threads == 1:
        is_bad = read(0, len(blocks))
    else:
        with ThreadPoolExecutor(threads) as pool:
            is_bad = any([*pool.map(read, bounds[:-1], bounds[1:])])
    if is_bad:
        raise CorruptCheckpointError(
            f"{entry.path}: {name} has a scale that is no number (NaN or infinite). The file is damaged, or its "
            "quantiser was at fault: download it again, or take another."
        )
    return blocks
