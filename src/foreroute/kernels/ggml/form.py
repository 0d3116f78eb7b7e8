"""Where an expert's matrices and biases lie in a slot, and how the family joins gate and up."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from foreroute.checkpoint.assembly import GGUF_PREFIX, MXFP4_IN_BLOCKS, StoredMatrix, StoredPart
from foreroute.checkpoint.layouts import ExpertLayout, LayerExperts
from foreroute.kernels.ggml.library import Library
from foreroute.kernels.ggml.types import F32, TYPE_NUMBERS, BlockType
from foreroute.kernels.torch.experts import ExpertMath

# ggml's operations that join gate and up; "torch": the family's own, between two graphs.
GatingKind = Literal["swiglu", "geglu", "swiglu_oai", "torch"]
# gpt-oss's constants: its sigmoid's factor, and where both halves are clamped.
OAI_ALPHA, OAI_LIMIT = 1.702, 7.0
_BIAS_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_PROBE_ROWS, _PROBE_WIDTH = 8, 64


@dataclass(frozen=True)
class SlotMatrix:
    """A matrix [rows, columns] of blocks, `offset` bytes into a slot, its rows `row_stride` bytes apart.

    is_interleaved: eight rows lie side by side (interleaved.py).
    """

    kind: BlockType
    rows: int
    columns: int
    offset: int
    row_stride: int
    is_interleaved: bool = False


@dataclass(frozen=True)
class Gating:
    """How gate and up become the input of the second product.

    kind: ggml's operation, or "torch" for `family`: [rows, gate and up] -> [rows, intermediate].
    is_interleaved: the family's rows of gate and up alternate, where `family` is called.
    """

    kind: GatingKind
    family: Callable[[torch.Tensor], torch.Tensor]
    is_interleaved: bool = False


@dataclass(frozen=True)
class BlockForm:
    """An expert in a slot: up to two matrices before the gating and one after it; biases by offset, -1 where absent.

    first: gate and up, or the only one. down: [hidden, intermediate]. bias_type: ggml's number of the biases' type.
    is_paired: a byte of the blocks holds two neighbours (Hugging Face's MXFP4), where ggml's holds weights that are 16
        apart.
    """

    first: tuple[SlotMatrix, ...]
    down: SlotMatrix
    gating: Gating
    first_biases: tuple[int, ...] = ()
    down_bias: int = -1
    bias_type: int = F32
    is_paired: bool = False

    @property
    def in_turns(self) -> SlotMatrix | None:
        """Gate and up as one matrix, if their rows alternate in the slot."""
        gate = self.first[0]
        row_bytes = gate.kind.row_bytes(gate.columns)
        if gate.row_stride != 2 * row_bytes:
            return None
        return SlotMatrix(gate.kind, 2 * gate.rows, gate.columns, gate.offset, row_bytes)

    @property
    def hidden(self) -> int:
        """Width of the input and of the output."""
        return self.down.rows

    @property
    def intermediate(self) -> int:
        """Width between the products."""
        return self.down.columns

    @property
    def biases(self) -> tuple[tuple[int, int], ...]:
        """(offset, numbers) of the biases in a slot."""
        first = [(at, one.rows) for at, one in zip(self.first_biases, self.first, strict=False)]
        return (*first, *(() if self.down_bias < 0 else ((self.down_bias, self.down.rows),)))


def form_of(layer: LayerExperts, math: ExpertMath | None, library: Library) -> BlockForm | str:
    """Describe a layer's experts for ggml's kernels, or say in a few words why they cannot compute it.

    Args:
        layer: as its experts are read. math: the family's maths, or None where it could not be described.
    """
    if math is None:
        return "how the family computes an expert is not known"
    if not layer.parts:
        return "its weights are not stored in blocks"
    up, down = layer.parts[math.up_at], layer.parts[math.down_at]
    stored = [*up.matrices, *down.matrices]
    found = [_slot_matrix(matrix, layer.layout, library) for matrix in stored]
    absent = next((one for one in found if isinstance(one, str)), None)
    if absent is not None or len(down.matrices) != 1 or not 1 <= len(up.matrices) <= 2:
        return absent or "its matrices are divided in an unknown way"
    paired = {matrix.coding.kind == MXFP4_IN_BLOCKS for matrix in stored}
    if len(paired) > 1:
        return "the orders of its matrices' weights differ"
    *first, last = (one for one in found if not isinstance(one, str))
    gating = _gating(math, len(first), up.is_interleaved, first[0].rows == 2 * last.columns)
    if len(first) == 1 and first[0].is_interleaved and gating.is_interleaved:
        gating = replace(gating, kind="torch")
    elif len(first) == 1 and gating.kind != "torch":
        first = _halves(first[0], gating.is_interleaved)
    biases = _biases(layer, math, len(first), gating)
    if isinstance(biases, str):
        return biases
    return BlockForm(tuple(first), last, gating, *biases, is_paired=paired.pop())


def is_in_blocks(layer: LayerExperts) -> bool:
    """Whether a layer stores a matrix in blocks of ggml's."""
    return any(matrix.coding.block_type for part in layer.parts for matrix in part.matrices)


def _slot_matrix(matrix: StoredMatrix, layout: ExpertLayout, library: Library) -> SlotMatrix | str:
    name = matrix.coding.block_type
    if not name:
        return f"ggml has no blocks for {matrix.coding.kind}"
    if name not in library.types:
        return f"ggml {library.version} has no {name}"
    block = library.types[name]
    if matrix.cols % block.weights:
        return f"rows of {matrix.cols} weights are no whole blocks of {name}"
    part = layout.parts[matrix.at[0]]
    is_interleaved = bool(matrix.coding.order)
    return SlotMatrix(block, matrix.rows, matrix.cols, part.offset, block.row_bytes(matrix.cols), is_interleaved)


def _halves(both: SlotMatrix, is_interleaved: bool) -> list[SlotMatrix]:
    """Gate and up of a matrix that holds them in turns, or one after the other."""
    rows, row_bytes = both.rows // 2, both.row_stride
    step, second = (2 * row_bytes, row_bytes) if is_interleaved else (row_bytes, rows * row_bytes)
    return [replace(both, rows=rows, offset=both.offset + start, row_stride=step) for start in (0, second)]


def _biases(
    layer: LayerExperts, math: ExpertMath, num_matrices: int, gating: Gating
) -> tuple[tuple[int, ...], int, int] | str:
    """Offsets of the biases before the gating, that of the one after the second product, and their type."""
    if math.output_scale != 1.0:
        return "its outputs are scaled after their gate weights"
    used = [layer.parts[at] for at in (math.up_bias_at, math.down_bias_at) if at >= 0]
    kinds = {_bias_kind(layer, part) for part in used}
    if not kinds:
        return (), -1, F32
    if len(kinds) > 1 or not kinds <= set(_BIAS_BYTES):
        return "its biases are not stored as numbers of one type"
    (kind,) = kinds
    first: tuple[int, ...] = ()
    if math.up_bias_at >= 0:
        part = layer.parts[math.up_bias_at]
        first = _offsets(layer, part)
        if len(first) == 2 and part.is_interleaved != gating.is_interleaved:
            return "its biases of gate and up do not lie as its matrices do"
        if len(first) > num_matrices or (len(first) < num_matrices and gating.is_interleaved):
            return "its biases of gate and up do not lie as its matrices do"
        if len(first) < num_matrices:
            first = (first[0], first[0] + part.shape[0] // 2 * _BIAS_BYTES[kind])
    down = -1 if math.down_bias_at < 0 else _offsets(layer, layer.parts[math.down_bias_at])[0]
    return first, down, TYPE_NUMBERS[kind]


def _bias_kind(layer: LayerExperts, part: StoredPart) -> str:
    if not part.matrices:
        return layer.layout.parts[part.at].dtype
    kinds = {matrix.coding.kind.removeprefix(GGUF_PREFIX) for matrix in part.matrices}
    return kinds.pop() if len(kinds) == 1 else ""


def _offsets(layer: LayerExperts, part: StoredPart) -> tuple[int, ...]:
    at = [matrix.at[0] for matrix in part.matrices] or [part.at]
    return tuple(layer.layout.parts[one].offset for one in at)


def _gating(math: ExpertMath, num_matrices: int, is_interleaved: bool, is_whole: bool) -> Gating:
    """Find ggml's operation by what the family's gives for random numbers, as every family names its own.

    Args:
        is_whole: a single matrix is as high as gate and up together: which of its rows are which is found too.
    """
    if num_matrices == 1 and not is_whole:
        return Gating("torch", math.gate)
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(_PROBE_ROWS, _PROBE_WIDTH, generator=generator, dtype=torch.float32) * 6 for _ in range(2))
    for in_turns in (is_interleaved,) if num_matrices == 2 else (False, True):
        with torch.no_grad():
            theirs = math.gate(join(gate, up, in_turns))
            for kind, candidate in _CANDIDATES.items():
                if theirs.shape == gate.shape and torch.allclose(theirs, candidate(gate, up), rtol=1e-5, atol=1e-6):
                    return Gating(kind, math.gate, in_turns)
    return Gating("torch", math.gate, is_interleaved)


def join(gate: torch.Tensor, up: torch.Tensor, is_interleaved: bool) -> torch.Tensor:
    """Gate and up [rows, intermediate] in the family's order: [rows, 2 * intermediate]."""
    if is_interleaved:
        return torch.stack((gate, up), -1).flatten(-2)
    return torch.cat((gate, up), -1)


def in_order(rows: torch.Tensor) -> torch.Tensor:
    """`rows` [n, columns] with every 32 numbers in the order of the blocks of a form that `is_paired`."""
    return rows.view(len(rows), -1, 16, 2).transpose(2, 3).reshape(len(rows), -1)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def _geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def _swiglu_oai(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate = gate.clamp(max=OAI_LIMIT)
    return gate * torch.sigmoid(gate * OAI_ALPHA) * (up.clamp(-OAI_LIMIT, OAI_LIMIT) + 1)


_CANDIDATES: dict[GatingKind, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "swiglu": _swiglu,
    "geglu": _geglu,
    "swiglu_oai": _swiglu_oai,
}
