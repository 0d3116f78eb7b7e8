"""The few types that every layer shares. Neither torch nor threads here.

A *MoE layer* is counted by itself: layer 0 is the first layer that has experts, whatever its index in the model.
An *expert key* is the flat int that the hot path uses in place of an (layer, expert) pair:
`key = layer * num_experts + expert`, with `num_experts` the widest layer's; `ExpertKeys` does that arithmetic.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Told how far a long piece of work is: (done, of all). The other: of which piece, (what, done, of all).
Progress = Callable[[int, int], None]
NamedProgress = Callable[[str, int, int], None]


class ExpertId(NamedTuple):
    """One expert: the MoE layer (0-based, counted over MoE layers only) and the expert's index in it."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"expert {self.expert} of MoE layer {self.layer}"


@dataclass(frozen=True, slots=True)
class ExpertKeys:
    """The arithmetic of expert keys.

    widths: experts of each MoE layer. per_layer: keys of a layer, the experts of the widest one.
    """

    widths: tuple[int, ...]
    per_layer: int

    @classmethod
    def of(cls, widths: Sequence[int]) -> "ExpertKeys":
        """The keys of MoE layers with so many experts each."""
        return cls(tuple(widths), max(widths))

    @property
    def num_keys(self) -> int:
        """How many keys there are, those of narrower layers' absent experts included."""
        return self.per_layer * len(self.widths)

    def all(self) -> list[int]:
        """The keys of all experts that there are, ascending."""
        return [self.key(layer, expert) for layer, width in enumerate(self.widths) for expert in range(width)]

    def key(self, layer: int, expert: int) -> int:
        """The key of one expert."""
        return layer * self.per_layer + expert

    def layer_of(self, key: int) -> int:
        """The MoE layer of a key."""
        return key // self.per_layer

    def expert_id(self, key: int) -> ExpertId:
        """The (layer, expert) pair of a key."""
        return ExpertId(*divmod(key, self.per_layer))

    def keys_of(self, layer: int, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Per token the keys of its routed experts; ids that are no expert of the layer become -1, which no key is."""
        width, base = self.widths[layer], layer * self.per_layer
        return [[base + expert if 0 <= expert < width else -1 for expert in row] for row in rows]

    def experts_of(self, layer: int, keys: Iterable[int]) -> list[int]:
        """The expert indices of keys of `layer`; -1 for a negative key."""
        base = layer * self.per_layer
        return [key - base if key >= 0 else -1 for key in keys]


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
