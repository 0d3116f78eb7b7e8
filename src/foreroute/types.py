"""The few types that every layer shares. Neither torch nor threads here.

A *MoE layer* is counted by itself: layer 0 is the first layer that has experts, whatever its index in the model.
An *expert key* is the flat int that the hot path uses in place of an (layer, expert) pair:
`key = layer * num_experts + expert`, with `num_experts` the widest layer's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class ExpertId(NamedTuple):
    """One expert: the MoE layer (0-based, counted over MoE layers only) and the expert's index in it."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"expert {self.expert} of MoE layer {self.layer}"


class Guess(NamedTuple):
    """The experts that a predictor expects a MoE layer to route to.

    layer: the MoE layer guessed.
    experts: distinct expert indices, best first; over all tokens of the step.
    """

    layer: int
    experts: Sequence[int]


@dataclass(frozen=True, slots=True)
class Copy:
    """One rectangular move from a read's bytes into a slot; all offsets and strides in bytes.

    The source is `rows` x `cols` items of `itemsize` bytes, contiguous. The destination may be strided: that is how
    concatenated, interleaved and transposed tensors are put together while they are copied.
    """

    src_offset: int
    dst_offset: int
    rows: int
    cols: int
    itemsize: int
    dst_row_stride: int
    dst_col_stride: int

    @property
    def nbytes(self) -> int:
        """Bytes moved."""
        return self.rows * self.cols * self.itemsize

    @property
    def is_flat(self) -> bool:
        """True when the destination is contiguous in the source's own order: one plain copy of bytes."""
        return self.dst_col_stride == self.itemsize and (
            self.rows == 1 or self.dst_row_stride == self.cols * self.itemsize
        )


@dataclass(frozen=True, slots=True)
class Read:
    """One contiguous range of a file that holds (a part of) an expert, and where its bytes go in the slot.

    checksum: xxh3-64 of the whole range, or None where the file carries none (plain safetensors).
    """

    path: str
    offset: int
    nbytes: int
    copies: tuple[Copy, ...]
    checksum: int | None = None

    @property
    def is_direct(self) -> bool:
        """True when the bytes can land in the slot as they are: one flat copy from 0 to 0."""
        return len(self.copies) == 1 and self.copies[0].is_flat and self.copies[0].dst_offset == 0


# All that is needed to fill one slot with one expert.
ExpertReads = tuple[Read, ...]
