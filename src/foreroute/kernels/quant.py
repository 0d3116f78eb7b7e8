"""Quantised experts on the CPU: torch's own int8 and int4 kernels, straight from the slot's memory, in bfloat16.

For few rows their cost is reading the weights. For many they lose to a plain product, so that there an int8 matrix is
turned back first; the order of int4's numbers is the kernel's own, and another on another kind of CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash

from foreroute.kernels.cpu import ExpertMath, Operands

# Rows from which turning an int8 matrix back and multiplying plainly is quicker.
_MANY_ROWS = 128
_INT8_MOST, _INT4_MOST, _INT4_MIDDLE = 127, 15, 8


@dataclass(frozen=True)
class Matrix:
    """One quantised matrix [out, in]: `values` and `scales` as the kernels of `bits` and `group` take them."""

    values: torch.Tensor
    scales: torch.Tensor
    bits: int
    group: int


def encode(weights: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise `weights` [out, in], any float dtype, to the nearest.

    Returns:
        int8: values [out, in] int8, scales [out]. int4: values [out, in / 2] uint8 in the kernel's own order, scales
        [in / group, out, 2]: scale and zero point. Scales in bfloat16; values are chosen for the rounded ones.
    """
    rows = weights.float()
    if bits == 8:
        scales = (rows.abs().amax(1) / _INT8_MOST).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        values = torch.round(rows / scales.float()[:, None]).clamp(-_INT8_MOST, _INT8_MOST)
        return values.to(torch.int8), scales
    grouped = rows.view(len(rows), -1, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / _INT4_MOST).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    zero = (low + scale.float() * _INT4_MIDDLE).bfloat16()
    steps = torch.round((grouped - zero.float()[..., None]) / scale.float()[..., None]) + _INT4_MIDDLE
    values = steps.clamp(0, _INT4_MOST).to(torch.int32).view_as(rows)
    packed = torch._convert_weight_to_int4pack_for_cpu(values, 1)
    return packed, torch.stack([scale, zero], -1).transpose(0, 1).contiguous()


def decode(matrix: Matrix) -> torch.Tensor:
    """The matrix [in, out] that the kernels multiply with, in bfloat16."""
    if matrix.bits == 8:
        return (matrix.values.bfloat16() * matrix.scales[:, None]).t()
    columns = matrix.values.shape[1] * 2
    # The kernel itself knows its order: it is asked for the products with unit vectors.
    return product(torch.eye(columns, dtype=torch.bfloat16), matrix)


def order_of(bits: int, group: int) -> str:
    """Tells one order of packed numbers from another; "" where they lie in rows and columns."""
    if bits == 8:
        return ""
    known = torch.arange(64 * 128, dtype=torch.float32).view(64, 128).sin()
    packed, _ = encode(known, bits, group)
    return xxhash.xxh3_64_hexdigest(packed.numpy().tobytes())


def product(rows: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """`rows` [n, in] bfloat16 times the matrix: [n, out], by the kernel."""
    if matrix.bits == 8:
        return torch._weight_int8pack_mm(rows, matrix.values, matrix.scales)
    return torch._weight_int4pack_mm_for_cpu(rows, matrix.values, matrix.group, matrix.scales)


@dataclass(frozen=True)
class QuantisedMath(ExpertMath):
    """A family's expert with both matrices quantised. An expert's operands are its matrices and biases.

    bits, group: of the codec. positions: of the family's parts among the stored ones, which have scales between them.
    """

    bits: int = 8
    group: int = 0
    positions: tuple[int, ...] = ()

    def operands(self, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """An expert's stored parts, as they are: matrices followed by their scales."""
        return tuple(parts)

    @property
    def operand_kind(self) -> tuple[int, int, bool]:
        """Two maths of one kind share their operands' views."""
        return (self.up_at, self.down_at, False)

    def widths(self, shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Columns of the first and of the second product."""
        return shapes[self.positions[self.up_at]][0], shapes[self.positions[self.down_at]][0]

    @property
    def takes_stored(self) -> bool:
        """The operands are what is stored."""
        return True

    def matrix(self, operands: Operands, part_at: int) -> Matrix:
        """The matrix that was the family's part `part_at`."""
        at = self.positions[part_at]
        return Matrix(operands[at], operands[at + 1], self.bits, self.group)

    def bias(self, operands: Operands, part_at: int) -> torch.Tensor:
        """The bias that was the family's part `part_at`."""
        return operands[self.positions[part_at]]

    def multiply(self, rows: torch.Tensor, operands: Operands, part_at: int) -> torch.Tensor:
        """`rows` [n, in] times the expert's matrix."""
        matrix = self.matrix(operands, part_at)
        if self.bits == 8 and len(rows) >= _MANY_ROWS:
            return torch.mm(rows, decode(matrix))
        return product(rows, matrix)

    def multiply_into(self, out: torch.Tensor, rows: torch.Tensor, operands: Operands, part_at: int) -> None:
        """The same, written to `out`."""
        out.copy_(self.multiply(rows, operands, part_at))


def quantised(math: ExpertMath, num_parts: Sequence[int], bits: int, group: int) -> QuantisedMath:
    """A family's maths over quantised parts.

    Args:
        num_parts: stored parts that each of the family's parts became: 2 for a matrix, 1 for a bias.
    """
    starts = [sum(num_parts[:at]) for at in range(len(num_parts))]
    return QuantisedMath(
        math.gate, math.up_at, math.down_at, math.up_bias_at, math.down_bias_at, math.is_transposed,
        bits, group, tuple(starts),
    )  # fmt: skip
