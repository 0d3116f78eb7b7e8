"""Quantised experts on the CPU: torch's own int8 and int4 kernels, straight from the slot's memory, in bfloat16.

For few rows their cost is reading the weights. For many they lose to a plain product, so that there an int8 matrix is
turned back first; the order of int4's numbers is the kernel's own, and another on another kind of CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash

from foreroute.checkpoint.codecs import Codec, check_shapes
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.errors import StoreError, UnsupportedModelError
from foreroute.kernels.torch.experts import ExpertMath, Operands, gate_rows

# Rows from which turning an int8 matrix back and multiplying plainly is quicker.
_MANY_ROWS = 128
_INT8_MOST, _INT4_MOST, _INT4_MIDDLE = 127, 15, 8
# Times that scale and zero of an int4 group are fitted to its steps. The error of a product is 7.9 % with none, and
# 7.5, 7.4 and 7.3 % with 1, 2 and 3, of weights that training gave and of normal ones.
_FITS = 2


@dataclass(frozen=True)
class Matrix:
    """One quantised matrix [out, in]: `values` and `scales` as the kernels of `bits` and `group` take them."""

    values: torch.Tensor
    scales: torch.Tensor
    bits: int
    group: int


def encode(weights: torch.Tensor, bits: int, group: int, num_fits: int = _FITS) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise `weights` [out, in], any float dtype.

    Args:
        num_fits: times that an int4 group's scale and zero, which span its range at first, are chosen anew: those of
            the least squared error for the steps that its weights have, which then take the nearest step again.
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
    low, high, mean = grouped.amin(-1), grouped.amax(-1), grouped.mean(-1)
    scale = ((high - low) / _INT4_MOST).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    zero = (low + scale.float() * _INT4_MIDDLE).bfloat16()
    steps = _nearest_steps(grouped, scale, zero)
    for _ in range(num_fits):
        middle = steps.mean(-1)
        spread = steps.square().sum(-1) - group * middle.square()
        common = (steps * grouped).sum(-1) - group * middle * mean
        # Steps that are all the same have no spread, and leave the scale as it is.
        fitted = torch.where(spread > 0.5, common / spread.clamp(min=0.5), scale.float())
        scale = fitted.clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        zero = (mean - scale.float() * middle).bfloat16()
        steps = _nearest_steps(grouped, scale, zero)
    packed = torch._convert_weight_to_int4pack_for_cpu((steps + _INT4_MIDDLE).to(torch.int32).view_as(rows), 1)
    return packed, torch.stack([scale, zero], -1).transpose(0, 1).contiguous()


def _nearest_steps(grouped: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Of weights [rows, groups, group] the steps -8..7 from the zero point, in float32."""
    steps = (grouped - zero.float()[..., None]) / scale.float()[..., None]
    return steps.round_().clamp_(-_INT4_MIDDLE, _INT4_MOST - _INT4_MIDDLE)


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
    packed, _ = encode(known, bits, group, num_fits=0)
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
        if matrix.bits == 8 and len(rows) >= _MANY_ROWS:
            return torch.mm(rows, decode(matrix))
        return product(rows, matrix)

    def multiply_into(self, out: torch.Tensor, rows: torch.Tensor, operands: Operands, part_at: int) -> None:
        """The same, written to `out`."""
        out.copy_(self.multiply(rows, operands, part_at))


class QuantisedToken:
    """One token through several quantised experts: as `OneToken`, without a bit of a resident model to keep to.

    Outputs go to their places in the top-k, whatever order they come in, and are summed at once: the same bits in every
    order of arrival, and no call per expert beyond its two products. Not by a product in fp32: its library's threads
    and the kernels' wait for each other, 240 us each time.

    Args:
        max_experts: the most experts of a token.
    """

    def __init__(self, max_experts: int) -> None:
        self._rows: list[torch.Tensor | None] = [None] * max_experts
        self._routed: Sequence[int] = ()

    def begin(self, routed: Sequence[int]) -> None:
        """A new token's step, with the key at each place of its top-k."""
        self._routed = routed
        self._rows = [None] * len(routed)

    def run(self, math: QuantisedMath, hidden: torch.Tensor, keys: Sequence[int], operands: Sequence[Operands]) -> None:
        """Compute the experts `keys` for `hidden` [1, hidden]."""
        up_at, down_at = math.positions[math.up_at], math.positions[math.down_at]
        group = math.group
        kernel = _int8_product if math.bits == 8 else torch._weight_int4pack_mm_for_cpu
        up = torch.cat([kernel(hidden, expert[up_at], group, expert[up_at + 1]) for expert in operands])
        if math.up_bias_at >= 0:
            up += torch.stack([math.bias(expert, math.up_bias_at) for expert in operands])
        inner = gate_rows(math.gate, up)
        out = [
            kernel(row, expert[down_at], group, expert[down_at + 1])
            for row, expert in zip(inner, operands, strict=True)
        ]
        if math.down_bias_at >= 0:
            out = [row + math.bias(expert, math.down_bias_at) for row, expert in zip(out, operands, strict=True)]
        self._place(keys, out)

    def put(self, keys: Sequence[int], rows: torch.Tensor) -> None:
        """Take `rows` [keys, hidden] for the outputs of these experts, before their gate weights."""
        self._place(keys, rows.split(1))

    def _place(self, keys: Sequence[int], rows: Sequence[torch.Tensor]) -> None:
        place_of, places = self._routed.index, self._rows
        for key, row in zip(keys, rows, strict=True):
            places[place_of(key)] = row

    def total(self, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum [1, hidden]; what was neither run nor put counts for nothing.

        Args:
            weights: [1, k] gate weights.
        """
        rows = [row for row in self._rows if row is not None]
        if len(rows) < len(self._rows):
            weights = weights[:, [at for at, row in enumerate(self._rows) if row is not None]]
        out = torch.cat(rows)
        return (out * weights.t()).sum(0, keepdim=True).to(out.dtype)


def _int8_product(rows: torch.Tensor, values: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    return torch._weight_int8pack_mm(rows, values, scales)


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


def math_of(
    codec: Codec, order: str, math: Sequence[ExpertMath | None], source: ExpertTable, compute_dtype: torch.dtype
) -> list[QuantisedMath]:
    """Each layer's maths over quantised parts.

    Args:
        order: of the store. math: the families' own. source: the experts as the checkpoint stores them.
    Raises:
        UnsupportedModelError: a family whose maths is not known here.
        StoreError: the store was packed on another kind of CPU, or the compute dtype is not bfloat16.
    """
    if order != order_of(codec.bits, codec.group):
        raise StoreError(
            f"The {codec.name} store was packed on another kind of CPU, whose kernels want another order of numbers. "
            "Pack again here: `foreroute pack --force`."
        )
    if compute_dtype != torch.bfloat16:
        raise StoreError(
            f"A store of {codec.name} experts is computed in bfloat16, and the model in "
            f"{str(compute_dtype).removeprefix('torch.')}. Give --dtype bfloat16, or --packed no."
        )
    made = []
    for layer, entry in zip(source.layers, math, strict=True):
        if entry is None:
            raise UnsupportedModelError(
                f"{layer.name}: how this family computes an expert is not known. Use --packed no."
            )
        num_parts = [min(len(part.shape), 2) for part in layer.family_layout.parts]
        made.append(quantised(entry, num_parts, codec.bits, codec.group))
    # Its kernels would read past the ends of rows that are not whole blocks.
    check_shapes(source, codec, [entry.is_transposed for entry in made])
    return made
