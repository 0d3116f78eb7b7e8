"""The maths of experts on the CPU, bit for bit what transformers' eager experts do.

A family is described by the flags that transformers' decorator sets and by its own gating function. Families differ in
small ways all the same, so that what is written here is not trusted but proven at load, by comparing bits with the
family's own forward (loading/math_check.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch

# One expert's tensors in the layout's order, in the compute dtype, weights as [in, out] (see ExpertMath.operands).
Operands = Sequence[torch.Tensor]

# Numbers in two of the widest vectors (bf16 in 512 bits), which torch's elementwise loops take at a time; as bytes a
# multiple of its alignment.
_WHOLE_VECTORS = 64
# Where a tensor of its own begins.
_ALIGNED_BYTES = 64
# Up to here torch gives an elementwise call to one thread (its grain size).
_UNDIVIDED_NUMBERS = 32768


@dataclass(frozen=True)
class ExpertMath:
    """How a family computes one expert.

    gate: [rows, gate_up] -> [rows, intermediate]; the family's own activation and gating.
    up_at, down_at, up_bias_at, down_bias_at: positions of the tensors among an expert's parts; -1 where absent.
    is_transposed: weights are stored as [in, out] in place of [out, in].
    """

    gate: Callable[[torch.Tensor], torch.Tensor]
    up_at: int
    down_at: int
    up_bias_at: int = -1
    down_bias_at: int = -1
    is_transposed: bool = False

    def operands(self, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """An expert's parts as the products want them: weights as [in, out] views, biases as they are. No copy."""
        if self.is_transposed:
            return tuple(parts)
        weights = (self.up_at, self.down_at)
        return tuple(part.t() if at in weights else part for at, part in enumerate(parts))

    @property
    def operand_kind(self) -> tuple[int, int, bool]:
        """Two maths of one kind share their operands' views."""
        return (self.up_at, self.down_at, self.is_transposed)

    def widths(self, shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Columns of the first and of the second product, for parts of these shapes."""
        out_dim = 1 if self.is_transposed else 0
        return shapes[self.up_at][out_dim], shapes[self.down_at][out_dim]

    @property
    def takes_stored(self) -> bool:
        """The operands are what is stored, in whatever dtypes; else they are wanted in the compute dtype."""
        return False

    def multiply(self, rows: torch.Tensor, operands: Operands, part_at: int) -> torch.Tensor:
        """`rows` [n, in] times the expert's matrix that is part `part_at`."""
        return torch.mm(rows, operands[part_at])

    def multiply_into(self, out: torch.Tensor, rows: torch.Tensor, operands: Operands, part_at: int) -> None:
        """The same, written to `out`."""
        torch.mm(rows, operands[part_at], out=out)

    def bias(self, operands: Operands, part_at: int) -> torch.Tensor:
        """The expert's bias that is part `part_at`."""
        return operands[part_at]

    def __call__(self, rows: torch.Tensor, operands: Operands) -> torch.Tensor:
        """The expert's output [rows, hidden] for `rows` [rows, hidden], before its gate weight."""
        inner = self.multiply(rows, operands, self.up_at)
        if self.up_bias_at >= 0:
            inner = inner + self.bias(operands, self.up_bias_at)
        out = self.multiply(self.gate(inner), operands, self.down_at)
        return out if self.down_bias_at < 0 else out + self.bias(operands, self.down_bias_at)


def gate_rows(gate: Callable[[torch.Tensor], torch.Tensor], up: torch.Tensor) -> Sequence[torch.Tensor]:
    """`up` [rows, gate_up] gated: [1, intermediate] each, with the bits of a row that is gated alone.

    One call for all rows where that is the same. It is not where vectors run across rows: what no whole vector of a
    call is left for, at its end or where threads divide it, is computed by other code, with other roundings.
    """
    # A gated row is as wide as its input, or half as wide: whole vectors in either case.
    if up.numel() <= _UNDIVIDED_NUMBERS and up.shape[1] % (2 * _WHOLE_VECTORS) == 0:
        return gate(up).split(1)
    return [gate(row) for row in up.split(1)]


def _gate_several(gate: Callable[[torch.Tensor], torch.Tensor], ups: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Each of `ups` [rows, gate_up] gated; in one call where that has the bits of a call each, see `gate_rows`."""
    if len(ups) == 1 or ups[0].shape[1] % (2 * _WHOLE_VECTORS) or sum(map(torch.numel, ups)) > _UNDIVIDED_NUMBERS:
        return [gate(up) for up in ups]
    return gate(torch.cat(list(ups))).split([len(up) for up in ups])


def compute_several(
    math: ExpertMath, rows: Sequence[torch.Tensor], operands: Sequence[Operands]
) -> Sequence[torch.Tensor]:
    """Several experts, each for `rows` [n, hidden] of its own: what a call of `math` each would give, bit for bit.

    Args:
        rows: of each expert, aligned (`rows_are_aligned`).
    """
    ups = [math.multiply(some, expert, math.up_at) for some, expert in zip(rows, operands, strict=True)]
    if math.up_bias_at >= 0:
        ups = [up + math.bias(expert, math.up_bias_at) for up, expert in zip(ups, operands, strict=True)]
    inner = _gate_several(math.gate, ups)
    outs = [math.multiply(some, expert, math.down_at) for some, expert in zip(inner, operands, strict=True)]
    if math.down_bias_at >= 0:
        outs = [out + math.bias(expert, math.down_bias_at) for out, expert in zip(outs, operands, strict=True)]
    return outs


def rows_are_aligned(rows: torch.Tensor) -> bool:
    """Each row of [n, width] lies as a tensor of its own would: products may round otherwise elsewhere."""
    return rows.shape[1] * rows.element_size() % _ALIGNED_BYTES == 0


def _aligned_rows(num_rows: int, width: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """[num_rows, width], each row aligned as a tensor of its own is: products may round otherwise elsewhere."""
    whole = ceil(width / _WHOLE_VECTORS) * _WHOLE_VECTORS
    return torch.empty(num_rows, whole, dtype=dtype, device=device)[:, :width]


class OneToken:
    """One token through several experts, which come in any order and are summed in ascending order.

    What a token's step costs beside reading the weights is calls: products write into rows of one buffer, so that the
    gating, the gate weights and the sum are one call each for all experts. Not for two threads at once.

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
        self._up_rows = self._up.split(1)
        self._out_rows = self._out.split(1)
        self._keys: list[int] = []
        self._routed: Sequence[int] = ()

    def begin(self, routed: Sequence[int]) -> None:
        """A new token's step, with the key at each place of its top-k."""
        self._keys.clear()
        self._routed = routed

    def run(self, math: ExpertMath, hidden: torch.Tensor, keys: Sequence[int], operands: Sequence[Operands]) -> None:
        """Compute the experts `keys` for `hidden` [1, hidden]."""
        multiply_into = math.multiply_into
        first = len(self._keys)
        last = first + len(keys)
        self._keys.extend(keys)
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
        """Take `rows` [keys, hidden] for the outputs of these experts, before their gate weights."""
        first = len(self._keys)
        self._keys.extend(keys)
        self._out[first : first + len(keys)] = rows

    def total(self, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum [1, hidden] over the experts that were run or put, in ascending order of their keys.

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
        # As eager does: from zero, rounded to the activation dtype after each expert, in ascending order. One
        # index_add_ for all rows would keep bf16 sums in fp32 in between, and give other bits.
        total = torch.zeros_like(self._out_rows[0])
        for row in weighted.to(total.dtype).split(1):
            total.add_(row)
        return total
