"""Types shared by all modules: expert keys, and the reads that load an expert. No torch, no threads.

*MoE layers* are numbered by themselves: layer 0 is the first layer with experts, whatever its index in the model.
An *expert key* is the int that the hot path uses instead of a (layer, expert) pair:
`key = layer * num_experts + expert`, with `num_experts` the widest layer's; see `ExpertKeys`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# ggml's types that floats can be quantised to without a matrix of importances, as GGUF names them.
QUANTISED_TYPES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip
# Called with the progress of long work: (done, of all). NamedProgress: (name of the work, done, of all).
Progress = Callable[[int, int], None]
NamedProgress = Callable[[str, int, int], None]

# Unit of O_DIRECT's file offsets, lengths and addresses: the largest block size of common disks and file systems.
BLOCK_BYTES = 4096


def round_up(num_bytes: int, multiple: int = BLOCK_BYTES) -> int:
    """The least multiple of `multiple` that is at least `num_bytes`."""
    return -(-num_bytes // multiple) * multiple


def round_down(num_bytes: int) -> int:
    """The most whole blocks that are at most `num_bytes`, in bytes."""
    return num_bytes // BLOCK_BYTES * BLOCK_BYTES


class ExpertId(NamedTuple):
    """One expert: the MoE layer (0-based, counted over MoE layers only) and the expert's index in it."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"expert {self.expert} of MoE layer {self.layer}"


@dataclass(frozen=True, slots=True)
class ExpertKeys:
    """Converts between expert keys and (layer, expert).

    widths: experts of each MoE layer. per_layer: keys of a layer, the experts of the widest one.
    """

    widths: tuple[int, ...]
    per_layer: int

    @classmethod
    def of(cls, widths: Sequence[int]) -> "ExpertKeys":
        """Make the keys of MoE layers with `widths` experts."""
        return cls(tuple(widths), max(widths))

    @property
    def num_keys(self) -> int:
        """Number of keys, including unused ones of narrower layers."""
        return self.per_layer * len(self.widths)

    def all(self) -> list[int]:
        """Return the keys of all experts, ascending."""
        return [self.key(layer, expert) for layer, width in enumerate(self.widths) for expert in range(width)]

    def key(self, layer: int, expert: int) -> int:
        """Return the key of expert `expert` of `layer`."""
        return layer * self.per_layer + expert

    def expert_id(self, key: int) -> ExpertId:
        """Return the (layer, expert) pair of a key."""
        return ExpertId(*divmod(key, self.per_layer))

    def keys_of(self, layer: int, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return per token the keys of its expert ids in `rows`; ids out of `layer`'s range become -1."""
        width, base = self.widths[layer], layer * self.per_layer
        return [[base + expert if 0 <= expert < width else -1 for expert in row] for row in rows]

    def experts_of(self, layer: int, keys: Iterable[int]) -> list[int]:
        """Return the expert ids of `keys` of `layer`; -1 for a negative key."""
        base = layer * self.per_layer
        return [key - base if key >= 0 else -1 for key in keys]


@dataclass(frozen=True, slots=True)
class Copy:
    """One rectangular copy from a read's bytes into a slot; all offsets and strides in bytes.

    The source is `rows` x `cols` items of `itemsize` bytes, contiguous. The destination may be strided, to
    concatenate, interleave or transpose tensors while they are copied.
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
        """Bytes copied."""
        return self.rows * self.cols * self.itemsize

    @property
    def is_flat(self) -> bool:
        """Whether the destination is contiguous in the source's order: one plain copy of bytes."""
        return self.dst_col_stride == self.itemsize and (
            self.rows == 1 or self.dst_row_stride == self.cols * self.itemsize
        )


@dataclass(frozen=True, slots=True)
class Read:
    """One contiguous range of a file that holds (a part of) an expert, and its copies into the slot.

    checksum: xxh3-64 of the whole range, or None if the file has none (plain safetensors).
    """

    path: str
    offset: int
    nbytes: int
    copies: tuple[Copy, ...]
    checksum: int | None = None

    @property
    def is_direct(self) -> bool:
        """Whether the bytes can be read straight into the slot: one flat copy to offset 0."""
        return len(self.copies) == 1 and self.copies[0].is_flat and self.copies[0].dst_offset == 0


# All reads that load one expert into a slot.
ExpertReads = tuple[Read, ...]


@dataclass(frozen=True, slots=True)
class SlotClass:
    """Slots of one length, one behind the other in the pool's memory, for the experts of some MoE layers.

    Their numbers are `first` to `first + num_slots - 1`; slot s begins at byte `start + s * slot_bytes` of the pool.
    staging_slots: the most of them that prefetched experts may take before they are used.
    """

    slot_bytes: int
    num_slots: int
    layers: tuple[int, ...]
    staging_slots: int
    first: int = 0
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return self.num_slots * self.slot_bytes

    def offset(self, slot: int) -> int:
        """The byte of the pool at which `slot` begins."""
        return self.start + slot * self.slot_bytes
