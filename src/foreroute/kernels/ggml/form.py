"""Where an expert's matrices and biases lie in a slot, and how the family joins gate and up."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from foreroute.checkpoint.layouts import ExpertLayout, LayerExperts
from foreroute.checkpoint.stored_parts import GGUF_PREFIX, StoredMatrix, StoredPart
from foreroute.kernels.ggml.library import Library
from foreroute.kernels.ggml.types import BlockType
from foreroute.kernels.torch.experts import ExpertMath

# ggml's operations that join gate and up; "torch": the family's own, between two graphs.
GatingKind = Literal["swiglu", "geglu", "swiglu_oai", "torch"]
# gpt-oss's constants: its sigmoid's factor, and where both halves are clamped.
OAI_ALPHA, OAI_LIMIT = 1.702, 7.0
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

    first: gate and up, or the only one. down: [hidden, intermediate]. biases are F32.
    """

    first: tuple[SlotMatrix, ...]
    down: SlotMatrix
    gating: Gating
    first_biases: tuple[int, ...] = ()
    down_bias: int = -1

    @property
    def hidden(self) -> int:
        """Width of the input and of the output."""
        return self.down.rows

    @property
    def intermediate(self) -> int:
        """Width between the products."""
        return self.down.columns

    @property
    def regions(self) -> tuple[tuple[int, int], ...]:
        """(offset, bytes) of all that is read of a slot: matrices, then biases."""
        matrices = [(one.offset, one.rows * one.row_stride) for one in (*self.first, self.down)]
        biases = [(at, 4 * one.rows) for at, one in zip(self.first_biases, self.first, strict=False)]
        last = [] if self.down_bias < 0 else [(self.down_bias, 4 * self.down.rows)]
        return (*matrices, *biases, *last)


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
    first = [_slot_matrix(matrix, layer.layout, library) for matrix in up.matrices]
    last = [_slot_matrix(matrix, layer.layout, library) for matrix in down.matrices]
    absent = next((one for one in (*first, *last) if isinstance(one, str)), None)
    if absent is not None or len(last) != 1 or not 1 <= len(first) <= 2:
        return absent or "its matrices are divided in an unknown way"
    biases = _biases(layer, math)
    if isinstance(biases, str):
        return biases
    gating = _gating(math, len(first), up.is_interleaved)
    matrices = [one for one in first if not isinstance(one, str)]
    (only,) = (one for one in last if not isinstance(one, str))
    return BlockForm(tuple(matrices), only, gating, *biases)


def _slot_matrix(matrix: StoredMatrix, layout: ExpertLayout, library: Library) -> SlotMatrix | str:
    kind = matrix.coding.kind
    if not kind.startswith(GGUF_PREFIX):
        return f"ggml has no blocks for {kind}"
    name = kind.removeprefix(GGUF_PREFIX)
    if name not in library.types:
        return f"ggml {library.version} has no {name}"
    block = library.types[name]
    if matrix.cols % block.weights:
        return f"rows of {matrix.cols} weights are no whole blocks of {name}"
    part = layout.parts[matrix.at[0]]
    return SlotMatrix(block, matrix.rows, matrix.cols, part.offset, block.row_bytes(matrix.cols))


def _biases(layer: LayerExperts, math: ExpertMath) -> tuple[tuple[int, ...], int] | str:
    """Offsets of the biases before the gating, and of the one after the second product."""

    def offsets(part: StoredPart) -> tuple[int, ...] | None:
        stored = [layer.layout.parts[matrix.at[0]] for matrix in part.matrices]
        are_floats = all(matrix.coding.kind == GGUF_PREFIX + "F32" for matrix in part.matrices)
        return tuple(one.offset for one in stored) if part.matrices and are_floats else None

    first = () if math.up_bias_at < 0 else offsets(layer.parts[math.up_bias_at])
    down = (-1,) if math.down_bias_at < 0 else offsets(layer.parts[math.down_bias_at])
    if first is None or down is None or len(down) != 1:
        return "its biases are not stored as F32"
    return first, down[0]


def _gating(math: ExpertMath, num_matrices: int, is_interleaved: bool) -> Gating:
    """Find ggml's operation by what the family's gives for random numbers, as every family names its own."""
    if num_matrices == 1:
        return Gating("torch", math.gate)
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(_PROBE_ROWS, _PROBE_WIDTH, generator=generator, dtype=torch.float32) * 6 for _ in range(2))
    given = join(gate, up, is_interleaved)
    with torch.no_grad():
        theirs = math.gate(given)
        for kind, candidate in _CANDIDATES.items():
            if theirs.shape == gate.shape and torch.allclose(theirs, candidate(gate, up), rtol=1e-5, atol=1e-6):
                return Gating(kind, math.gate, is_interleaved)
    return Gating("torch", math.gate, is_interleaved)


def join(gate: torch.Tensor, up: torch.Tensor, is_interleaved: bool) -> torch.Tensor:
    """Gate and up [rows, intermediate] in the family's order: [rows, 2 * intermediate]."""
    if is_interleaved:
        return torch.stack((gate, up), -1).flatten(-2)
    return torch.cat((gate, up), -1)


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
