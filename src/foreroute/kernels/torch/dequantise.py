"""Dequantise experts on use, from the quantised form in which they were published.

The results equal transformers' own dequantisers bit for bit, in the layout of its resident model, so that the products
that follow are the family's. Slots keep the stored form: one matrix at a time is dequantised, in reused memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache

import torch

from foreroute.checkpoint.assembly import MXFP4_BLOCK_BYTES, MXFP4_IN_BLOCKS, Coding, StoredMatrix, StoredPart
from foreroute.kernels.ggml.interleaved import plain_rows
from foreroute.kernels.torch.experts import ExpertMath, Operands
from foreroute.kernels.torch.gguf_blocks import FLOATS, GGUF_DECODERS

# (components, out [rows, columns], coding): dequantises a matrix's components, which each decoder names, into `out`.
Dequantiser = Callable[[Sequence[torch.Tensor], torch.Tensor, Coding], None]

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_MXFP4_GROUP = 32
# The exponent of 2 ** 128, which float32 does not hold: torch.ldexp handles it, and takes 14 times as long.
_EXPONENT_BEYOND = 255
# A 1 in each of a word's eight four-bit integers.
_ONE_EACH = 0x11111111
# Bit offsets in a word of eight outputs' numbers: AWQ's order, made for its kernel.
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
# Rows that are scaled at a time if that needs a temporary, so that it stays in the cache.
_ROWS_AT_ONCE = 128
_WORDS_AT_ONCE = 16


@lru_cache
def _fp4_pairs(dtype: torch.dtype) -> torch.Tensor:
    """Table of each byte's two numbers, low half first, as one item of an integer dtype."""
    numbers = torch.tensor(_FP4, dtype=dtype)
    return _as_words(torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], -1))


@lru_cache
def _fp4_fours(dtype: torch.dtype) -> torch.Tensor:
    """The same table for every two bytes: half as many look-ups."""
    pairs = _fp4_pairs(dtype)
    return _as_words(torch.stack([pairs.repeat(256), pairs.repeat_interleave(256)], -1))


@lru_cache
def _powers_of_two() -> torch.Tensor:
    """2 ** (byte - 127) for every byte, in float32."""
    return torch.pow(2.0, torch.arange(256, dtype=torch.int32) - 127)


def _as_words(rows: torch.Tensor) -> torch.Tensor:
    words = {4: torch.int32, 8: torch.int64}
    return rows.contiguous().view(words[rows.shape[-1] * rows.element_size()]).flatten()


def decode_mxfp4(components: Sequence[torch.Tensor], out: torch.Tensor, coding: Coding) -> None:
    """Dequantise blocks [rows, columns / 2], two FP4 numbers a byte, with exponents [rows, columns / 32]."""
    blocks, exponents = components
    scales = _powers_of_two()[exponents.int()].unsqueeze(-1)
    grouped = out.view(*exponents.shape, _MXFP4_GROUP)
    if out.element_size() == 2:
        table, index = _fp4_fours(out.dtype), blocks.reshape(-1).view(torch.uint16)
    else:
        table, index = _fp4_pairs(out.dtype), blocks.reshape(-1)
    torch.index_select(table, 0, index.int(), out=out.view(-1).view(torch.int64))
    if int(exponents.max()) == _EXPONENT_BEYOND:
        torch.ldexp(grouped, (exponents.int() - 127).unsqueeze(-1), out=grouped)
    elif out.dtype == torch.float16:
        # Its range is too small to hold the scales.
        grouped.copy_(grouped.float() * scales)
    else:
        grouped.mul_(scales.to(out.dtype))


def decode_mxfp4_in_blocks(components: Sequence[torch.Tensor], out: torch.Tensor, coding: Coding) -> None:
    """Dequantise blocks [rows, columns / 32 * 17]: an exponent and 16 bytes each, as `decode_mxfp4` has them apart."""
    blocks = components[0].view(*out.shape[:1], -1, MXFP4_BLOCK_BYTES)
    # Rows of gate and up may alternate in `out`.
    numbers = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    decode_mxfp4([blocks[..., 1:].reshape(len(blocks), -1), blocks[..., 0]], numbers, coding)
    if numbers is not out:
        out.copy_(numbers)


def decode_fp8(components: Sequence[torch.Tensor], out: torch.Tensor, coding: Coding) -> None:
    """Dequantise float8 [rows, columns] with a scale per block of rows and columns; the last blocks may be partial."""
    values, scales = components
    per_column = _spread(scales.float(), coding.block[1], values.shape[1])
    for at, first in enumerate(range(0, len(values), coding.block[0])):
        rows = slice(first, first + coding.block[0])
        out[rows] = values[rows].float() * per_column[at]


def decode_fp8_scaled(components: Sequence[torch.Tensor], out: torch.Tensor, coding: Coding) -> None:
    """Dequantise float8 [rows, columns] in the scales' dtype: one scale for all, per row, or per block."""
    values, scales = components
    rows_at_once = coding.block[0] or len(values)
    grid = scales.view(-(-len(values) // rows_at_once), -1)
    per_column = _spread(grid, coding.block[1] or values.shape[1], values.shape[1])
    if rows_at_once == 1:
        for first in range(0, len(values), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            out[rows] = values[rows].to(scales.dtype) * grid[rows]
        return
    for at, first in enumerate(range(0, len(values), rows_at_once)):
        rows = slice(first, first + rows_at_once)
        out[rows] = values[rows].to(scales.dtype) * per_column[at]


def decode_packed_int4(components: Sequence[torch.Tensor], out: torch.Tensor, coding: Coding) -> None:
    """Dequantise words [rows, columns / 8] of eight four-bit integers (8 is zero) with a scale per group of a row."""
    words, scales = components
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    for first in range(0, len(words), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        steps = ((words[rows].unsqueeze(-1) >> shifts) & 15) - 8
        of_rows = scales[rows]
        grouped = steps.view(*of_rows.shape, -1).to(scales.dtype) * of_rows.unsqueeze(-1)
        out[rows] = grouped.view(len(of_rows), -1)


def decode_gptq_int4(components: Sequence[torch.Tensor], out: torch.Tensor, coding: Coding) -> None:
    """Dequantise words [columns / 8, rows], eight four-bit integers along the input each; scales, zeros per group.

    The last group may have fewer columns.
    """
    words, scales, zero_words = components
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    zeros = gptq_zeros(zero_words, scales, coding)
    per_group = coding.block[1] // 8 or len(words)
    for at, first in enumerate(range(0, len(words), per_group)):
        steps = (words[first : first + per_group].unsqueeze(1) >> shifts[None, :, None]) & 15
        columns = (steps.view(-1, words.shape[1]) - zeros[at]).to(scales.dtype) * scales[at]
        out[:, 8 * first : 8 * (first + per_group)] = columns.t()


def decode_gptq_reordered(components: Sequence[torch.Tensor], out: torch.Tensor, coding: Coding) -> None:
    """Dequantise as `decode_gptq_int4`, with each column's group given in `groups` [columns], any order (desc_act)."""
    words, scales, zero_words, groups = components
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    zeros = gptq_zeros(zero_words, scales, coding)
    for first in range(0, len(words), _WORDS_AT_ONCE):
        steps = (words[first : first + _WORDS_AT_ONCE].unsqueeze(1) >> shifts[None, :, None]) & 15
        of_columns = groups[8 * first : 8 * (first + _WORDS_AT_ONCE)].long()
        columns = (steps.view(-1, words.shape[1]) - zeros[of_columns]).to(scales.dtype) * scales[of_columns]
        out[:, 8 * first : 8 * (first + _WORDS_AT_ONCE)] = columns.t()


def gptq_zeros(zero_words: torch.Tensor, scales: torch.Tensor, coding: Coding) -> torch.Tensor:
    """Unpack GPTQ's zero points [groups, rows], from words [groups, rows / 8]; `scales` has their shape."""
    if coding.is_zero_shifted:
        # Added to whole words, as 1 was subtracted from them: a zero point of 0 borrowed from the next one.
        zero_words = zero_words + _ONE_EACH
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((zero_words.unsqueeze(-1) >> shifts) & 15).view(scales.shape)


def decode_awq_int4(components: Sequence[torch.Tensor], out: torch.Tensor, coding: Coding) -> None:
    """Dequantise words [columns, rows / 8], eight four-bit integers along the output each; scales, zeros per group."""
    words, scales, zero_words = components
    shifts = torch.tensor(AWQ_SHIFTS, dtype=torch.int32)
    zeros = ((zero_words.unsqueeze(-1) >> shifts) & 15).view(scales.shape)
    per_group = len(words) // len(scales)
    for at, first in enumerate(range(0, len(words), per_group)):
        steps = ((words[first : first + per_group].unsqueeze(-1) >> shifts) & 15).view(per_group, -1)
        out[:, first : first + per_group] = ((steps - zeros[at]).to(scales.dtype) * scales[at]).t()


def _spread(grid: torch.Tensor, columns_at_once: int, num_columns: int) -> torch.Tensor:
    """Repeat a grid's scales for every column."""
    return grid.repeat_interleave(columns_at_once, 1)[:, :num_columns]


DECODERS: Mapping[str, Dequantiser] = {
    "mxfp4": decode_mxfp4,
    MXFP4_IN_BLOCKS: decode_mxfp4_in_blocks,
    "fp8": decode_fp8,
    "fp8-scaled": decode_fp8_scaled,
    "packed-int4": decode_packed_int4,
    "gptq-int4": decode_gptq_int4,
    "gptq-int4-reordered": decode_gptq_reordered,
    "awq-int4": decode_awq_int4,
    **GGUF_DECODERS,
}


@dataclass
class Workspaces:
    """Reused scratch memory, by purpose, shape and dtype. Not thread-safe."""

    _taken: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = field(default_factory=dict, repr=False)

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return memory [*shape] of `dtype` for `purpose`, with any content."""
        key = (purpose, shape, dtype)
        if key not in self._taken:
            # A normal tensor even if the caller's inference mode is on: the next caller's may be off.
            with torch.inference_mode(False):
                self._taken[key] = torch.empty(shape, dtype=dtype)
        return self._taken[key]


def decode_matrix(matrix: StoredMatrix, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Dequantise the matrix into `out` [rows, cols]; `stored` are all stored parts of its expert."""
    components = [stored[at] for at in matrix.at]
    if matrix.coding.order:
        components = [plain_rows(matrix.coding.block_type, one) for one in components]
    if matrix.coding.rounded_to:
        # As the published format's own product of scale and step, which is in the scales' dtype, is rounded.
        numbers = torch.empty(out.shape, dtype=FLOATS[matrix.coding.rounded_to], device=out.device)
        DECODERS[matrix.coding.kind](components, numbers, matrix.coding)
        out.copy_(numbers)
        return
    DECODERS[matrix.coding.kind](components, out, matrix.coding)


def decode_part(
    part: StoredPart, stored: Sequence[torch.Tensor], dtype: torch.dtype, workspaces: Workspaces
) -> torch.Tensor:
    """Dequantise `part`, one of the family's tensors, in the family's layout.

    Args:
        stored: all stored parts of the expert. dtype: of the result.
    Returns:
        A tensor [*part.shape] in `workspaces`, valid until the next one of its shape; for a part that is not quantised
        and has that dtype, the stored tensor itself.
    """
    if not part.matrices:
        return stored[part.at].to(dtype)
    rows = sum(matrix.rows for matrix in part.matrices)
    numbers = workspaces.take("rows", (rows, part.matrices[0].cols), dtype)
    first = 0
    for at, matrix in enumerate(part.matrices):
        turns = slice(at, None, len(part.matrices))
        decode_matrix(matrix, stored, numbers[turns if part.is_interleaved else slice(first, first + matrix.rows)])
        first += matrix.rows
    if not part.is_transposed:
        return numbers.view(part.shape)
    # Copied: a product with a transposed view can have other bits.
    return workspaces.take("columns", part.shape, dtype).copy_(numbers.t())


@dataclass(frozen=True)
class DequantisingMath(ExpertMath):
    """A family's expert whose operands are the stored parts; its tensors are dequantised one at a time.

    parts: the family's tensors. dtype: the compute dtype.
    """

    parts: tuple[StoredPart, ...] = ()
    dtype: torch.dtype = torch.float32
    workspaces: Workspaces = field(default_factory=Workspaces, compare=False)

    def operands(self, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return an expert's stored parts unchanged; a family tensor has [out, in] or [in, out] weights."""
        return tuple(parts)

    @property
    def operand_kind(self) -> tuple[int, int, bool, bool]:
        """Maths of equal kind share their operands' views."""
        return (self.up_at, self.down_at, False, False)

    @property
    def takes_stored(self) -> bool:
        """True: the operands are the stored parts."""
        return True

    def widths(self, shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Return the columns of the first and the second product."""
        return super().widths([part.shape for part in self.parts])

    def multiply(self, rows: torch.Tensor, operands: Operands, part_at: int) -> torch.Tensor:
        """Multiply `rows` [n, in] by matrix `part_at` of the expert's `operands`: [n, out]."""
        return self._product(rows, self._matrix(operands, part_at), part_at)

    def multiply_into(self, out: torch.Tensor, rows: torch.Tensor, operands: Operands, part_at: int) -> None:
        """Write the product of `rows` [n, in] and matrix `part_at` of `operands` to `out` [n, out]."""
        self._product(rows, self._matrix(operands, part_at), part_at, out)

    def bias(self, operands: Operands, part_at: int) -> torch.Tensor:
        """Return bias `part_at` [out] of the expert's `operands`."""
        return decode_part(self.parts[part_at], operands, self.dtype, self.workspaces)

    def family_parts(self, operands: Operands) -> tuple[torch.Tensor, ...]:
        """Return all of the family's tensors of an expert, [*part.shape] each, as copies."""
        return tuple(decode_part(part, operands, self.dtype, self.workspaces).clone() for part in self.parts)

    def _matrix(self, operands: Operands, part_at: int) -> torch.Tensor:
        made = decode_part(self.parts[part_at], operands, self.dtype, self.workspaces)
        return made if self.transposes(part_at) else made.t()


def dequantising(
    math: ExpertMath | None, parts: tuple[StoredPart, ...], dtype: torch.dtype, workspaces: Workspaces
) -> DequantisingMath:
    """Make `math` over stored `parts`, dequantised to `dtype` in `workspaces`; None only dequantises."""
    if math is None:
        return DequantisingMath(_no_gate, -1, -1, parts=parts, dtype=dtype, workspaces=workspaces)
    return DequantisingMath(
        **{field.name: getattr(math.with_own_biases, field.name) for field in fields(ExpertMath)},
        parts=parts, dtype=dtype, workspaces=workspaces,
    )  # fmt: skip


def _no_gate(rows: torch.Tensor) -> torch.Tensor:
    raise AssertionError("how this family computes an expert is not known")
