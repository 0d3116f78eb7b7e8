"""Compute quantised experts on the CPU: torch's int8 and int4 kernels, straight from the slot's memory, in bfloat16.

For few rows their cost is reading the weights. For many they are slower than a plain product, so an int8 matrix is
dequantised first; the kernel packs int4 in an order that depends on the kind of CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash

from foreroute.checkpoint.codecs import Codec, check_shapes
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.errors import StoreError, UnsupportedModelError
from foreroute.kernels.torch.experts import ExpertMath, Operands, gate_rows

# Rows from which dequantising an int8 matrix and a plain product are faster.
_MANY_ROWS = 128
_INT8_MOST, _INT4_MOST, _INT4_MIDDLE = 127, 15, 8
# How often the scale and zero of an int4 group are refitted to its steps. A product's error is 7.9 % without, and 7.5,
# 7.4 and 7.3 % with 1, 2 and 3 fits, for trained weights and for normally distributed ones.
_FITS = 2


@dataclass(frozen=True)
class Matrix:
    """One quantised matrix [out, in]: `values` and `scales` in the form of the kernels for `bits` and `group`."""

    values: torch.Tensor
    scales: torch.Tensor
    bits: int
    group: int


def encode(weights: torch.Tensor, bits: int, group: int, num_fits: int = _FITS) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise `weights` [out, in], any float dtype, to 8 or 4 `bits` (int4 in groups of `group` columns).

    Args:
        num_fits: how often an int4 group's scale and zero, which span its range at first, are refitted: to the least
            squared error for its weights' steps; then each weight takes its nearest step again.
    Returns:
        int8: values [out, in] int8, scales [out]. int4: values [out, in / 2] uint8 in the kernel's order, scales
        [in / group, out, 2]: scale and zero point. Scales in bfloat16; values are chosen for the rounded scales.
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
        # Steps that are all equal have no spread, and leave the scale unchanged.
        fitted = torch.where(spread > 0.5, common / spread.clamp(min=0.5), scale.float())
        scale = fitted.clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        zero = (mean - scale.float() * middle).bfloat16()
        steps = _nearest_steps(grouped, scale, zero)
    packed = torch._convert_weight_to_int4pack_for_cpu((steps + _INT4_MIDDLE).to(torch.int32).view_as(rows), 1)
    return packed, torch.stack([scale, zero], -1).transpose(0, 1).contiguous()


def _nearest_steps(grouped: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return the nearest steps -8..7 from the zero point of weights [rows, groups, group], in float32."""
    steps = (grouped - zero.float()[..., None]) / scale.float()[..., None]
    return steps.round_().clamp_(-_INT4_MIDDLE, _INT4_MOST - _INT4_MIDDLE)


def decode(matrix: Matrix) -> torch.Tensor:
    """Dequantise to the matrix [in, out] that the kernels multiply by, in bfloat16."""
    if matrix.bits == 8:
        return (matrix.values.bfloat16() * matrix.scales[:, None]).t()
    columns = matrix.values.shape[1] * 2
    # Only the kernel knows its order: multiplying by the identity gives the matrix.
    return product(torch.eye(columns, dtype=torch.bfloat16), matrix)


def order_of(bits: int, group: int) -> str:
    """Identify this CPU's order of packed numbers for `bits` and `group`; "" for plain rows and columns."""
    if bits == 8:
        return ""
    known = torch.arange(64 * 128, dtype=torch.float32).view(64, 128).sin()
    packed, _ = encode(known, bits, group, num_fits=0)
    return xxhash.xxh3_64_hexdigest(packed.numpy().tobytes())


def product(rows: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Multiply `rows` [n, in] bfloat16 by `matrix` with the kernel: [n, out]."""
    if matrix.bits == 8:
        return torch._weight_int8pack_mm(rows, matrix.values, matrix.scales)
    return torch._weight_int4pack_mm_for_cpu(rows, matrix.values, matrix.group, matrix.scales)


@dataclass(frozen=True)
class QuantisedMath(ExpertMath):
    """A family's expert with both matrices quantised. Its operands are its matrices, scales and biases.

    bits, group: of the codec. positions: of the family's parts among the stored ones, where scales lie between them.
    """

    bits: int = 8
    group: int = 0
    positions: tuple[int, ...] = ()

    def operands(self, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return an expert's stored parts unchanged: matrices [out, in], each followed by its scales."""
        return tuple(parts)

    @property
    def operand_kind(self) -> tuple[int, int, bool]:
        """Maths of equal kind share their operands' views."""
        return (self.up_at, self.down_at, False)

    def widths(self, shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Return the columns of the first and the second product."""
        return shapes[self.positions[self.up_at]][0], shapes[self.positions[self.down_at]][0]

    @property
    def takes_stored(self) -> bool:
        """True: the operands are the stored parts."""
        return True

    def matrix(self, operands: Operands, part_at: int) -> Matrix:
        """Return the quantised matrix of the family's part `part_at`, from the expert's `operands`."""
        at = self.positions[part_at]
        return Matrix(operands[at], operands[at + 1], self.bits, self.group)

    def bias(self, operands: Operands, part_at: int) -> torch.Tensor:
        """Return bias `part_at` [out] of the expert's `operands`."""
        return operands[self.positions[part_at]]

    def multiply(self, rows: torch.Tensor, operands: Operands, part_at: int) -> torch.Tensor:
        """Multiply `rows` [n, in] by matrix `part_at` of the expert's `operands`: [n, out]."""
        matrix = self.matrix(operands, part_at)
        if matrix.bits == 8 and len(rows) >= _MANY_ROWS:
            return torch.mm(rows, decode(matrix))
        return product(rows, matrix)

    def multiply_into(self, out: torch.Tensor, rows: torch.Tensor, operands: Operands, part_at: int) -> None:
        """Write the product of `rows` [n, in] and matrix `part_at` of `operands` to `out` [n, out]."""
        out.copy_(self.multiply(rows, operands, part_at))


class QuantisedToken:
    """Runs one token through several quantised experts: as `OneToken`, with no resident model's bits to reproduce.

    Outputs go to their positions in the top-k in any order of arrival, and are summed at once: always the same bits,
    and no call per expert beyond its two products. Not by a product in fp32: its library's threads and the kernels'
    wait for each other, 240 us each time.

    Args:
        max_experts: the most experts of a token.
    """

    def __init__(self, max_experts: int) -> None:
        self._rows: list[torch.Tensor | None] = [None] * max_experts
        self._routed: Sequence[int] = ()

    def begin(self, routed: Sequence[int]) -> None:
        """Begin a new token, with the key at each position of its top-k."""
        self._routed = routed
        self._rows = [None] * len(routed)

    def run(self, math: QuantisedMath, hidden: torch.Tensor, keys: Sequence[int], operands: Sequence[Operands]) -> None:
        """Compute the experts `keys` with `operands` by `math`, for `hidden` [1, hidden]."""
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
        """Use `rows` [keys, hidden] as the outputs of experts `keys`, before gate weights."""
        self._place(keys, rows.split(1))

    def _place(self, keys: Sequence[int], rows: Sequence[torch.Tensor]) -> None:
        place_of, places = self._routed.index, self._rows
        for key, row in zip(keys, rows, strict=True):
            places[place_of(key)] = row

    def total(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum [1, hidden] of the experts that were run or put.

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
    """Make a family's `math` over parts quantised to `bits` in groups of `group`.

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
    """Make each layer's math over parts quantised by `codec`.

    Args:
        order: of the store. math: the family's, per layer. source: the experts as the checkpoint stores them.
        compute_dtype: must be bfloat16.
    Raises:
        UnsupportedModelError: how the family computes an expert is not known.
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
    # The kernels would read past the ends of rows that are not whole blocks.
    check_shapes(source, codec, [entry.is_transposed for entry in made])
    return made
