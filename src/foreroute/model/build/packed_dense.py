"""Dense weights from a packed store: in its blocks for ggml's kernels, or dequantised where torch computes."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from foreroute.checkpoint.records import DenseRecords, PackedStore
from foreroute.errors import StoreError
from foreroute.kernels.ggml.linear import BlockMatrix
from foreroute.kernels.ggml.quantiser import BlockMemory
from foreroute.kernels.ggml.types import BlockType
from foreroute.kernels.torch.gguf_blocks import dequantise_gguf
from foreroute.model.build.dense_blocks import DenseMatrices


def dense_records(matrices: DenseMatrices, kind: str) -> DenseRecords:
    """How a store describes these matrices in blocks of the type `kind`: by name, whatever order modules come in."""
    shapes = {stored: matrices.shapes[ours] for ours, stored in matrices.stored.items()}
    return DenseRecords(kind, dict(sorted(shapes.items())))


def check_packed(store: PackedStore, matrices: DenseMatrices) -> None:
    """Check that the dense weights in `store`, if it has any, are those of the model.

    Raises:
        StoreError: they are others.
    """
    if store.dense.kind and store.dense != dense_records(matrices, store.dense.kind):
        raise StoreError(
            f"{store.path} does not belong to this model: its dense weights are others. Run `foreroute pack` again, or "
            "load with packed=no."
        )


class PackedMatrices:
    """The dense matrices of a packed store, as they lie there: see `MatrixSource`."""

    def __init__(self, matrices: DenseMatrices, store: PackedStore, kind: BlockType) -> None:
        self.embedding = matrices.embedding
        self._stored, self._store, self._kind, self._memory = matrices.stored, store, kind, BlockMemory()

    @property
    def names(self) -> Collection[str]:
        """See `MatrixSource`."""
        return self._stored

    def read(self, name: str, state: Mapping[str, Any]) -> BlockMatrix:
        """See `MatrixSource`.

        Raises:
            ReadError, ChecksumError: the store is damaged, or was changed.
        """
        stored = self._stored[name]
        rows, columns = self._store.dense.shapes[stored]
        blocks = self._memory.take(rows, self._kind.row_bytes(columns))
        self._store.read_dense(stored, blocks.view(-1).numpy().data)
        return BlockMatrix(self._kind, columns, blocks)


class LazyPackedMatrix:
    """A dense matrix of a packed store; indexing it reads and dequantises it."""

    def __init__(self, store: PackedStore, name: str, dtype: torch.dtype) -> None:
        self._store, self._name, self.dtype = store, name, dtype

    def is_floating_point(self) -> bool:
        """As in torch's tensors."""
        return True

    def __getitem__(self, at: Any) -> torch.Tensor:
        dense = self._store.dense
        rows, columns = dense.shapes[self._name]
        blocks = torch.empty(rows, dense.row_bytes(columns), dtype=torch.uint8)
        self._store.read_dense(self._name, blocks.view(-1).numpy().data)
        return dequantise_gguf(dense.kind, blocks).view(rows, columns).to(self.dtype)[at]


def packed_state(store: PackedStore, state: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """`state`, the checkpoint's weights by stored name, with the dense ones of `store` in place of its own.

    Args:
        dtype: of their numbers; that of the stored ones if None.
    """
    return {**state, **{name: LazyPackedMatrix(store, name, dtype or state[name].dtype) for name in store.dense.shapes}}
