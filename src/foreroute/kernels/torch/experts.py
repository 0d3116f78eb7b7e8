"""Compute experts on the CPU, bit for bit as transformers' eager experts.

A family is described by the flags that transformers' decorator sets and by its own gating function. As families differ
in small ways all the same, this code is checked at load, by comparing bits with the family's own forward
(loading/expert_math.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch

# One expert's tensors in the layout's order, in the compute dtype, weights as [in, out] (see ExpertMath.operands).
Operands = Sequence[torch.Tensor]

# Numbers in two of the widest vectors (bf16 in 512 bits), one iteration of torch's elementwise loops; in bytes a
# multiple of torch's alignment.
_WHOLE_VECTORS = 64
# Alignment of newly allocated tensors.
_ALIGNED_BYTES = 64
# Rows that are tried together, and what was found, by shapes.
_MOST_TRIED = 16
_ALIKE: dict[Any, bool] = {}
# Torch runs elementwise calls of up to this many numbers on one thread (its grain size).
_UNDIVIDED_NUMBERS = 32768


@dataclass(frozen=True)
class ExpertMath:
    """How a family computes one expert.

    gate: [rows, gate_up] -> [rows, intermediate]; the family's own activation and gating.
    up_at, down_at, up_bias_at, down_bias_at: positions of the tensors among an expert's parts; -1 if absent.
    is_transposed: weights are stored as [in, out] instead of [out, in].
    is_down_transposed: the second matrix alone is.
    multiplies_halves: gate and up, halves of the first matrix, are a product each: its width can change its bits.
    sums_at_once: the family adds the outputs of all experts in one call, which rounds sums in bfloat16 once.
    computes_all_rows: the family multiplies each expert with all rows of a step, zeros in place of those that it does
        not compute; so does this, as the number of rows in a product can change its bits.
    joined_biases: positions of the biases of the first and the second product, where the family adds each within its
        product, which rounds once; up_bias_at and down_bias_at are -1 then.
    output_scale: what the family multiplies an output by, after its gate weight.
    """

    gate: Callable[[torch.Tensor], torch.Tensor]
    up_at: int
    down_at: int
    up_bias_at: int = -1
    down_bias_at: int = -1
    is_transposed: bool = False
    is_down_transposed: bool = False
    multiplies_halves: bool = False
    sums_at_once: bool = False
    computes_all_rows: bool = False
    joined_biases: tuple[int, int] | None = None
    output_scale: float = 1.0

    @property
    def with_own_biases(self) -> "ExpertMath":
        """The same with the biases added after their products, for kernels that have no such product."""
        if self.joined_biases is None:
            return self
        up, down = self.joined_biases
        return replace(self, up_bias_at=up, down_bias_at=down, joined_biases=None)

    def weigh(self, outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Multiply `outputs` [rows, hidden] by the gate `weights` [rows, 1], and by the family's own scale."""
        weighted = outputs * weights
        return weighted if self.output_scale == 1.0 else weighted.mul_(self.output_scale)

    def operands(self, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return an expert's parts in the form for products: weights as [in, out] views, biases unchanged. No copy."""
        if self.is_transposed:
            return tuple(parts)
        weights = [at for at in (self.up_at, self.down_at) if not self.transposes(at)]
        return tuple(part.t() if at in weights else part for at, part in enumerate(parts))

    def transposes(self, part_at: int) -> bool:
        """Whether matrix `part_at` is stored as [in, out]."""
        return self.is_transposed or (self.is_down_transposed and part_at == self.down_at)

    @property
    def operand_kind(self) -> tuple[int, int, bool, bool]:
        """Maths of equal kind share their operands' views."""
        return (self.up_at, self.down_at, self.is_transposed, self.is_down_transposed)

    def widths(self, shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Return the columns of the first and the second product, for parts of these shapes."""
        up_width, down_width = (shapes[at][int(self.transposes(at))] for at in (self.up_at, self.down_at))
        return up_width, down_width

    @property
    def takes_stored(self) -> bool:
        """Whether the operands are the stored parts in any dtype; else they must be in the compute dtype."""
        return False

    def multiply(self, rows: torch.Tensor, operands: Operands, part_at: int) -> torch.Tensor:
        """Multiply `rows` [n, in] by matrix `part_at` of the expert's `operands`: [n, out]."""
        if self.joined_biases is not None:
            return torch.addmm(operands[self.joined_biases[part_at != self.up_at]], rows, operands[part_at])
        return self._product(rows, operands[part_at], part_at)

    def multiply_into(self, out: torch.Tensor, rows: torch.Tensor, operands: Operands, part_at: int) -> None:
        """Write the product of `rows` [n, in] and matrix `part_at` of `operands` to `out` [n, out]."""
        if self.joined_biases is not None:
            torch.addmm(operands[self.joined_biases[part_at != self.up_at]], rows, operands[part_at], out=out)
        else:
            self._product(rows, operands[part_at], part_at, out)

    def bias(self, operands: Operands, part_at: int) -> torch.Tensor:
        """Return bias `part_at` [out] of the expert's `operands`."""
        return operands[part_at]

    def _product(
        self, rows: torch.Tensor, matrix: torch.Tensor, part_at: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply `rows` [n, in] by `matrix` [in, out], which is part `part_at` of an expert; into `out`, if given."""
        if not self.multiplies_halves or part_at != self.up_at:
            return torch.mm(rows, matrix) if out is None else torch.mm(rows, matrix, out=out)
        halves = [torch.mm(rows, half) for half in matrix.chunk(2, dim=1)]
        return torch.cat(halves, dim=1) if out is None else out.copy_(torch.cat(halves, dim=1))

    def all_rows(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return `hidden` [rows, hidden] with zeros in the rows that are not of `tokens`."""
        return torch.zeros_like(hidden).index_copy_(0, tokens, hidden.index_select(0, tokens))

    def __call__(self, rows: torch.Tensor, operands: Operands) -> torch.Tensor:
        """Compute the expert (`operands`) for `rows` [rows, hidden]: outputs [rows, hidden] before gate weights."""
        inner = self.multiply(rows, operands, self.up_at)
        if self.up_bias_at >= 0:
            inner = inner + self.bias(operands, self.up_bias_at)
        out = self.multiply(self.gate(inner), operands, self.down_at)
        return out if self.down_bias_at < 0 else out + self.bias(operands, self.down_bias_at)


def gate_rows(gate: Callable[[torch.Tensor], torch.Tensor], up: torch.Tensor) -> Sequence[torch.Tensor]:
    """Apply `gate` to `up` [rows, gate_up]: [1, intermediate] each, with the bits of a row that is gated alone.

    In one call for all rows where the bits are the same. They differ where vectors run across rows: the remainder of a
    call that fills no whole vector, at its end or where threads divide it, takes other code, which rounds differently.
    """
    # A gated row is as wide as its input, or half as wide: whole vectors in either case.
    if up.numel() <= _UNDIVIDED_NUMBERS and up.shape[1] % (2 * _WHOLE_VECTORS) == 0:
        return gate(up).split(1)
    return [gate(row) for row in up.split(1)]


def _gate_several(gate: Callable[[torch.Tensor], torch.Tensor], ups: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Gate each of `ups` [rows, gate_up]; in one call where that has the bits of separate calls, see `gate_rows`."""
    if len(ups) == 1 or ups[0].shape[1] % (2 * _WHOLE_VECTORS) or sum(map(torch.numel, ups)) > _UNDIVIDED_NUMBERS:
        return [gate(up) for up in ups]
    return gate(torch.cat(list(ups))).split([len(up) for up in ups])


def compute_several(
    math: ExpertMath, rows: Sequence[torch.Tensor], operands: Sequence[Operands]
) -> Sequence[torch.Tensor]:
    """Compute several experts (`operands`), each for its `rows` [n, hidden], bit for bit as one call of `math` each.

    Args:
        rows: per expert, aligned (`rows_are_aligned`).
    """
    ups = [math.multiply(some, expert, math.up_at) for some, expert in zip(rows, operands, strict=True)]
    if math.up_bias_at >= 0:
        ups = [up + math.bias(expert, math.up_bias_at) for up, expert in zip(ups, operands, strict=True)]
    inner = _gate_several(math.gate, ups)
    outs = [math.multiply(some, expert, math.down_at) for some, expert in zip(inner, operands, strict=True)]
    if math.down_bias_at >= 0:
        outs = [out + math.bias(expert, math.down_bias_at) for out, expert in zip(outs, operands, strict=True)]
    return outs


def compute_rows_apart(
    math: ExpertMath, rows: Sequence[torch.Tensor], operands: Sequence[Operands]
) -> Sequence[torch.Tensor]:
    """The same, with the bits of one call of `math` for each row.

    Args:
        rows: per expert [n, hidden], of any alignment.
    """
    sizes = [len(some) for some in rows]
    if max(sizes) == 1:
        return compute_several(math, rows, operands)
    is_aligned = rows_are_aligned(rows[0])
    together = _MOST_TRIED if is_aligned and _are_alike(math, rows[0], operands[0]) else 1
    if max(sizes) <= together:
        return compute_several(math, rows, operands)
    pieces = [piece for some in rows for piece in some.split(together)]
    if not is_aligned:
        pieces = [piece.clone() for piece in pieces]
    of_pieces = [expert for expert, size in zip(operands, sizes, strict=True) for _ in range(ceil(size / together))]
    return torch.cat(list(compute_several(math, pieces, of_pieces))).split(sizes)


def _are_alike(math: ExpertMath, like: torch.Tensor, operands: Operands) -> bool:
    """Whether rows like `like` [n, hidden] have the same bits together as alone, for operands of these shapes.

    Tried once for each: which of its kernels a library takes depends on shapes alone.
    """
    shapes = (
        type(math),
        math.operand_kind,
        *((one.dtype, one.shape, one.stride()) for one in operands),
        torch.get_num_threads(),
    )
    if shapes not in _ALIKE:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(_MOST_TRIED, like.shape[1], generator=generator, dtype=torch.float32).to(like)
        alone = torch.cat([math(row.clone(), operands) for row in rows.split(1)])
        _ALIKE[shapes] = all(
            torch.equal(math(rows[:count].clone(), operands), alone[:count]) for count in range(2, _MOST_TRIED + 1)
        )
    return _ALIKE[shapes]


def rows_are_aligned(rows: torch.Tensor) -> bool:
    """Whether each row of `rows` [n, width] is aligned like a new tensor: else products may round differently."""
    return rows.shape[1] * rows.element_size() % _ALIGNED_BYTES == 0


def _aligned_rows(num_rows: int, width: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Allocate [num_rows, width], each row aligned like a new tensor: else products may round differently."""
    whole = ceil(width / _WHOLE_VECTORS) * _WHOLE_VECTORS
    return torch.empty(num_rows, whole, dtype=dtype, device=device)[:, :width]


class OneToken:
    """Runs one token through several experts, in any order, and sums them in ascending order.

    Besides reading weights, a token's cost is the number of calls: products write into rows of one buffer, so that the
    gating, the gate weights and the sum are one call each for all experts. Not thread-safe.

    Args:
        max_experts: the most experts of a token.
        up_width, hidden_width: columns of the first and of the second product.
    """

    def __init__(
        self,
        max_experts: int,
        up_width: int,
        hidden_width: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._up = _aligned_rows(max_experts, up_width, dtype, device)
        self._out = _aligned_rows(max_experts, hidden_width, dtype, device)
        self._sums_at_once = False
        self._up_rows = self._up.split(1)
        self._out_rows = self._out.split(1)
        self._keys: list[int] = []
        self._routed: Sequence[int] = ()
        self._scale = 1.0

    def begin(self, routed: Sequence[int]) -> None:
        """Begin a new token, with the key at each position of its top-k."""
        self._keys.clear()
        self._routed = routed

    def run(self, math: ExpertMath, hidden: torch.Tensor, keys: Sequence[int], operands: Sequence[Operands]) -> None:
        """Compute the experts `keys` with `operands` by `math`, for `hidden` [1, hidden]."""
        multiply_into, self._scale = math.multiply_into, math.output_scale
        first = len(self._keys)
        last = first + len(keys)
        self._keys.extend(keys)
        self._sums_at_once = math.sums_at_once
        up_at, down_at = math.up_at, math.down_at
        for row, expert in zip(self._up_rows[first:last], operands, strict=True):
            multiply_into(row, hidden, expert, up_at)
        if math.up_bias_at >= 0:
            for row, expert in zip(self._up_rows[first:last], operands, strict=True):
                row.add_(math.bias(expert, math.up_bias_at))
        inner = gate_rows(math.gate, self._up[first:last])
        for row, inner_row, expert in zip(self._out_rows[first:last], inner, operands, strict=True):
            multiply_into(row, inner_row, expert, down_at)
        if math.down_bias_at >= 0:
            for row, expert in zip(self._out_rows[first:last], operands, strict=True):
                row.add_(math.bias(expert, math.down_bias_at))

    def put(self, keys: Sequence[int], rows: torch.Tensor) -> None:
        """Use `rows` [keys, hidden] as the outputs of experts `keys`, before gate weights."""
        first = len(self._keys)
        self._keys.extend(keys)
        self._out[first : first + len(keys)] = rows

    def total(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum [1, hidden] of the experts that were run or put, in ascending order of keys.

        Args:
            weights: [1, k] gate weights.
        """
        routed = self._routed
        keys = self._keys
        num_run = len(keys)
        out = self._out[:num_run]
        if any(keys[at] > keys[at + 1] for at in range(num_run - 1)):
            order = sorted(range(num_run), key=keys.__getitem__)
            keys = [keys[at] for at in order]
            out = out.index_select(0, torch.tensor(order, device=out.device))
        columns = torch.tensor([routed.index(key) for key in keys], device=out.device)
        weighted = out * weights.view(-1).index_select(0, columns).unsqueeze(1)
        if self._scale != 1.0:
            weighted.mul_(self._scale)
        # As eager does: from zero, rounded to the activation dtype after each expert, in ascending order. One
        # index_add_ for all rows would keep bf16 sums in fp32 in between, and give other bits.
        total = torch.zeros_like(self._out_rows[0])
        if self._sums_at_once:
            return total.index_add_(0, torch.zeros_like(columns), weighted.to(total.dtype))
        for row in weighted.to(total.dtype).split(1):
            total.add_(row)
        return total
