"""Make GGUF's blocks of what the checkpoint stores, several experts at once.

`Quantiser` rounds, by ggml's quantiser. `Int4Blocks` does not: it finds published four-bit integers that blocks hold
exactly, and writes them there.
"""

import math
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from foreroute.checkpoint.assembly import GGUF_PREFIX, StoredPart
from foreroute.checkpoint.codecs import CODECS, INT4_TYPES, STORED, Codec, encoded_table, in_types, misfit_for_types
from foreroute.checkpoint.layouts import ExpertTable, LayerExperts, Part, layer_experts
from foreroute.errors import StoreError
from foreroute.kernels.ggml.library import Library
from foreroute.kernels.ggml.quantiser import UnfitWeightError, dequantise, quantise
from foreroute.kernels.ggml.types import BlockType
from foreroute.kernels.slot_views import TORCH_DTYPES
from foreroute.kernels.torch.dequantise import Workspaces, decode_part
from foreroute.kernels.torch.int4_blocks import into_blocks, types_that_hold
from foreroute.model.build.dense_blocks import QuantisedMatrices
from foreroute.model.build.packed_dense import dense_records
from foreroute.model.build.skeleton import Outline, stored_weights
from foreroute.transfer.disk import own_reader
from foreroute.types import Progress

# Weights that are turned into float32 at a time, so that they stay in the cache.
_CHUNK_WEIGHTS = 2**18
# Memory for experts that are quantised at once; one is always allowed.
_MOST_BYTES = 2 * 2**30
# Experts whose scales are read at once.
_RING_SLOTS = 8
_INEXACT_SCALE = "scales that are no float16"


@dataclass
class LayerError:
    """Quantisation error of a layer's matrices: sums of squares over the measured experts."""

    lost: float = 0.0
    whole: float = 0.0
    measured: int = 0

    @property
    def relative(self) -> float:
        """Root mean square error of an output, as a share of the output, for inputs with no preferred direction."""
        return (self.lost / self.whole) ** 0.5 if self.whole else 0.0


@dataclass
class Quantiser:
    """Quantises experts of `source` for a store of `codec`; `encode` may be called by several threads.

    source: the experts as the checkpoint stores them.
    library: ggml's. num_threads: the most experts at once. measured: experts per layer whose error is measured.
    table: the experts as the store has them.

    Raises:
        StoreError: a matrix whose rows are no whole blocks; or, from `encode`, a weight that no block can hold.
    """

    source: ExpertTable
    codec: Codec
    library: Library
    num_threads: int = 1
    measured: int = 4
    errors: list[LayerError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = encoded_table(self.source, self.codec)
        self.errors = [LayerError() for _ in self.table.layers]
        self._lock = threading.Lock()  # guards `errors`
        self._local = threading.local()
        each = self.source.slot_bytes + self.table.slot_bytes + max(map(_decoded_nbytes, self.source.layers))
        self.num_threads = max(1, min(self.num_threads, _MOST_BYTES // each))

    @property
    def is_measured(self) -> bool:
        """Whether every layer's error is known; not after a resumed pack that skipped a measured expert."""
        return all(
            error.measured == min(self.measured, layer.num_experts)
            for error, layer in zip(self.errors, self.table.layers, strict=True)
        )

    def encode(self, key: int, slot: memoryview) -> memoryview:
        """Quantise expert `key`, whose stored bytes are in `slot`; return its record, as long as a slot of the store.

        Raises:
            StoreError: a weight that is no number, or too large for its blocks.
        """
        layer, expert = self.source.expert_id(key)
        payload = bytearray(self.table.slot_bytes)
        memory = torch.frombuffer(payload, dtype=torch.uint8)
        described = self.source.layers[layer]
        stored = [stored_tensor(slot, part) for part in described.layout.parts]
        error = LayerError(measured=1) if expert < self.measured else None
        for at, part in enumerate(self.table.layers[layer].parts):
            try:
                self._encode_part(memory, layer, at, stored, error if len(part.shape) > 1 else None)
            except UnfitWeightError as unfit:
                raise StoreError(f"{self.source.label(key)}, {part.name}: {unfit}. Pack without --quant.") from None
        if error is not None:
            with self._lock:
                known = self.errors[layer]
                self.errors[layer] = LayerError(known.lost + error.lost, known.whole + error.whole, known.measured + 1)
        return memoryview(payload)

    def _encode_part(
        self, memory: torch.Tensor, layer: int, at: int, stored: Sequence[torch.Tensor], error: LayerError | None
    ) -> None:
        """Quantise the family's part `at` into its places of a record's `memory`."""
        target, described = self.table.layers[layer], self.source.layers[layer]
        part = target.parts[at]
        places = [target.layout.parts[matrix.at[0]] for matrix in part.matrices]
        if described.parts and _is_alike(part, described.parts[at]):
            # In these blocks already: quantising them again could move them.
            for place, matrix in zip(places, described.parts[at].matrices, strict=True):
                memory[place.offset : place.offset + place.nbytes] = stored[matrix.at[0]].reshape(-1)
            return
        rows = self._rows(described, at, stored)
        first = 0
        for which, (place, matrix) in enumerate(zip(places, part.matrices, strict=True)):
            of_matrix = rows[which :: len(places)] if part.is_interleaved else rows[first : first + matrix.rows]
            first += matrix.rows
            blocks = memory[place.offset : place.offset + place.nbytes].view(place.shape)
            self._quantise(matrix.coding.kind.removeprefix(GGUF_PREFIX), of_matrix, blocks, error)

    def _rows(self, described: LayerExperts, at: int, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """The family's part `at` as rows [out, in], any float dtype; of a bias [out, 1]."""
        part = described.parts[at] if described.parts else None
        is_transposed = described.form.transposes(described.family_layout.parts[at].name)
        if part is None or not part.matrices:
            return _upright(stored[at if part is None else part.at], is_transposed)
        # As the matrices lie, without turning them to the family's order and back.
        shape = part.shape[::-1] if part.is_transposed and len(part.shape) > 1 else part.shape
        numbers = decode_part(replace(part, shape=shape, is_transposed=False), stored, torch.float32, self._workspaces)
        return _upright(numbers, part.is_transposed != is_transposed)

    @property
    def _workspaces(self) -> Workspaces:
        """This thread's own."""
        found: Workspaces | None = getattr(self._local, "workspaces", None)
        if found is None:
            found = self._local.workspaces = Workspaces()
        return found

    def _quantise(self, kind_name: str, rows: torch.Tensor, blocks: torch.Tensor, error: LayerError | None) -> None:
        """Quantise `rows` [n, columns], any float dtype, into `blocks` [n, bytes of a row], some rows at a time."""
        kind, columns = self.library.types[kind_name], rows.shape[1]
        num_rows = max(1, _CHUNK_WEIGHTS // columns)
        for first in range(0, len(rows), num_rows):
            some, into = rows[first : first + num_rows], blocks[first : first + num_rows]
            floats = self._workspaces.take("chunk", tuple(some.shape), torch.float32).copy_(some)
            quantise(self.library, kind, floats, into)
            if error is not None:
                error.lost += float((dequantise(self.library, kind, into, columns) - floats).square().sum())
                error.whole += float(floats.square().sum())


class DenseQuantiser:
    """Quantises the dense matrices of a model, to the blocks that `--dense` makes of them at load.

    Args:
        sketch: the model's. kind: see `dense_type`. num_threads: of the quantiser.
    Attributes:
        records: the matrices, as a store has them.
    """

    def __init__(self, sketch: Outline, kind: BlockType, library: Library, num_threads: int = 1) -> None:
        self._source = QuantisedMatrices(sketch.linear, kind, library, num_threads)
        self._state, _ = stored_weights(sketch, torch.float32)
        self._ours = {stored: ours for ours, stored in sketch.linear.stored.items()}
        self.records = dense_records(sketch.linear, kind.name)

    def blocks(self, name: str) -> memoryview:
        """The blocks, as bytes, of the matrix with the stored name `name`.

        Raises:
            CorruptCheckpointError: a weight is no number, or too large. ReadError: it cannot be read.
        """
        return self._source.read(self._ours[name], self._state).blocks.view(-1).numpy().data


def _upright(numbers: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    """A matrix as [out, in]; a bias as [out, 1]."""
    if numbers.ndim == 1:
        return numbers[:, None]
    return numbers.t() if is_transposed else numbers


def _is_alike(part: StoredPart, stored: StoredPart) -> bool:
    """Whether a part is stored already in the blocks that it is to have."""
    return (part.is_interleaved, part.is_transposed) == (stored.is_interleaved, stored.is_transposed) and [
        (matrix.coding, matrix.rows, matrix.cols) for matrix in part.matrices
    ] == [(matrix.coding, matrix.rows, matrix.cols) for matrix in stored.matrices]


def _decoded_nbytes(layer: LayerExperts) -> int:
    """Bytes of the numbers of a published format that one expert takes while it is quantised."""
    return 4 * sum(math.prod(part.shape) for part in layer.parts if part.matrices)


def stored_tensor(slot: memoryview, part: Part) -> torch.Tensor:
    """A part [*part.shape] of the expert whose bytes are in `slot`."""
    dtype = TORCH_DTYPES[part.dtype]
    return torch.frombuffer(slot, dtype=dtype, count=part.nbytes // dtype.itemsize, offset=part.offset).view(part.shape)


@dataclass(frozen=True)
class HeldTypes:
    """Which layers' experts are held exactly by ggml's blocks.

    types: by layer and family's matrix, the smallest type that holds it in every expert.
    reasons: of the other layers of four-bit integers, by name, why none does.
    """

    types: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """A line for users on the layers that stay as they are; "" where there are none."""
        if not self.reasons:
            return ""
        whys = Counter(self.reasons.values()).most_common()
        told = "; ".join(f"{count} with {why}" for why, count in whys)
        return (
            f"{len(self.reasons)} of {len(self.reasons) + len(self.types)} MoE layers stay as published, and are "
            f"dequantised by torch at every use, as no type of ggml's holds their numbers exactly: {told}. "
            "--quant q8_0 or q4_k quantises them for ggml's kernels."
        )


def find_held(table: ExpertTable, progress: Progress) -> HeldTypes:
    """Read the scales and zeros of every expert of `table` that is stored in four-bit integers, and choose types.

    Args:
        progress: called with (experts done, all that are read).
    Raises:
        ReadError, ChangedFileError: as `pack`.
    Cost: 20 bits are read for every group of weights, in as many reads as there are such tensors.
    """
    misfits = {layer.name: misfit_for_types(layer) for layer in table.layers}
    layers = [layer for layer in table.layers if not misfits[layer.name]]
    reasons = {name: why for name, why in misfits.items() if why not in ("", "other")}
    found = {layer.name: {part.name: set(INT4_TYPES) for part in layer.parts if part.matrices} for layer in layers}
    if layers:
        read = ExpertTable(tuple(_scales_and_zeros(layer, table) for layer in layers), table.index)
        for done, (key, stored) in enumerate(_each(read), start=1):
            layer, at = layers[read.expert_id(key)[0]], 0
            for part in layer.parts:
                for matrix in part.matrices:
                    scales, *zeros = stored[at : at + len(matrix.at) - 1]
                    found[layer.name][part.name] &= {
                        *types_that_hold(matrix.coding, scales, zeros[0] if zeros else None)
                    }
                    at += len(matrix.at) - 1
            progress(done, read.total_slots)
    types = {
        name: {part: next(kind for kind in INT4_TYPES if kind in kinds) for part, kinds in parts.items()}
        for name, parts in found.items()
        if all(parts.values())
    }
    return HeldTypes(types, {**reasons, **dict.fromkeys(found.keys() - types.keys(), _INEXACT_SCALE)})


def _scales_and_zeros(layer: LayerExperts, table: ExpertTable) -> LayerExperts:
    """The experts of `layer` without their words."""
    sources = [layer.sources[at] for part in layer.parts for matrix in part.matrices for at in matrix.at[1:]]
    return layer_experts(layer.name, layer.num_experts, sources, table.index)


def _each(table: ExpertTable) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Every expert's key and stored tensors, in any order; the tensors are valid until the next one."""
    waiting, done = deque(table.keys.all()), 0
    free = list(range(_RING_SLOTS))
    options = {"label": table.label, "stamps": table.index.files}
    with own_reader(table.reads, _RING_SLOTS, table.slot_bytes, **options) as (transfer, slots):
        while done < table.total_slots:
            while waiting and free:
                transfer.demand(waiting.popleft(), free.pop())
            for completion in transfer.wait():
                if completion.error is not None:
                    raise completion.error
                layer, _ = table.expert_id(completion.key)
                parts = table.layers[layer].layout.parts
                yield completion.key, [stored_tensor(slots[completion.slot], part) for part in parts]
                free.append(completion.slot)
                done += 1


@dataclass
class Int4Blocks:
    """Makes records of experts in the blocks that hold them; a `Quantiser` that loses nothing. Thread-safe.

    source: the experts as the checkpoint stores them. types: see `HeldTypes`. num_threads: the most experts at once.
    table: the experts as the store has them.
    """

    source: ExpertTable
    types: Mapping[str, Mapping[str, str]]
    num_threads: int = 1
    codec = CODECS[STORED]

    def __post_init__(self) -> None:
        self.table = in_types(self.source, self.types)

    def encode(self, key: int, slot: memoryview) -> memoryview:
        """Make the record of expert `key`, whose stored bytes are in `slot`; it is as long as a slot of the store."""
        layer, _ = self.source.expert_id(key)
        before, after = self.source.layers[layer], self.table.layers[layer]
        payload = bytearray(self.table.slot_bytes)
        if before is after:
            for part in before.layout.parts:
                end = part.offset + part.nbytes
                payload[part.offset : end] = slot[part.offset : end]
            return memoryview(payload)
        stored = [stored_tensor(slot, part) for part in before.layout.parts]
        made = [stored_tensor(memoryview(payload), part) for part in after.layout.parts]
        for old, new in zip(before.parts, after.parts, strict=True):
            if not old.matrices:
                made[new.at].copy_(stored[old.at])
            for one, other in zip(old.matrices, new.matrices, strict=True):
                kind = other.coding.kind.removeprefix(GGUF_PREFIX)
                into_blocks(kind, one.coding, [stored[at] for at in one.at], made[other.at[0]])
        return memoryview(payload)
