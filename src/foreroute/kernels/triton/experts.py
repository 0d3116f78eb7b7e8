"""Compute experts through the slot table, as Triton kernels: kernels/triton/expert_form.py's `experts`, for a GPU.

Three launches: up and gate, down, the weighted sum. Nothing is copied to the host, no shape depends on data, and no two
programs write the same address, so that a CUDA graph can capture it and every run gives the same bits.

Memory-bound for the few tokens of a decode step: a program reads some rows of one expert once for all tokens routed to
it: the first (token, choice) pair of a slot does the work of the others. One token is multiplied on plain lanes; more
go through the tensor cores, 16 at a time, whose other columns are idle. A whole prompt is better computed layer by
layer elsewhere: here each block of 16 tokens reads its experts again.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton decides which parameters are tensors and which numbers.

import torch
import triton
import triton.language as tl

from foreroute.kernels.triton import expert_form
from foreroute.kernels.triton.expert_form import ExpertForm, MatrixForm

_SILU = tl.constexpr(expert_form.SILU)
_DOT_TOKENS = 16
_ROWS, _SUM_COLUMNS = 16, 256


@triton.jit
def _rounded(values, DTYPE: tl.constexpr):
    return values.to(DTYPE).to(tl.float32)


@triton.jit
def _sum_of_products(matrix, columns, DOT: tl.constexpr):
    """Multiply [rows, n] by [n, tokens] in float32."""
    if DOT:
        return tl.dot(matrix.to(columns.dtype), columns, input_precision="ieee")
    return tl.sum(matrix.to(tl.float32)[:, :, None] * columns.to(tl.float32)[None, :, :], 1)


@triton.jit
def _times(
    x, x_at, is_token, values, biases, row, rows, cols,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr, COLS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Multiply rows `row` of one matrix by the inputs at x + x_at [tokens]: [rows, tokens]; round, add bias, round."""
    is_row = row < rows
    acc = tl.zeros([row.shape[0], x_at.shape[0]], tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        if TRANSPOSED:
            at = col[None, :] * rows + row[:, None]
        else:
            at = row[:, None] * cols + col[None, :]
        matrix = tl.load(values + at, is_row[:, None] & (col < cols)[None, :], 0)
        columns = tl.load(x + x_at[None, :] + col[:, None], is_token[None, :] & (col < cols)[:, None], 0.0)
        acc += _sum_of_products(matrix, columns, DOT)
    acc = _rounded(acc, DTYPE)
    if HAS_BIAS:
        acc = _rounded(acc + _rounded(tl.load(biases + row, is_row, 0.0), DTYPE)[:, None], DTYPE)
    return acc


@triton.jit
def _work_of(slots, pair, slot, num_tokens, top_k, TOKENS: tl.constexpr, CHOICES: tl.constexpr):
    """Return the pair's block of tokens, each one's pair with this slot, whether it has one, and if `pair` is first."""
    token = pair // top_k // TOKENS * TOKENS + tl.arange(0, TOKENS)
    choice = tl.arange(0, CHOICES)
    at = token[:, None] * top_k + choice[None, :]
    is_choice = (token < num_tokens)[:, None] & (choice < top_k)[None, :]
    is_same = tl.load(slots + at, is_choice, -1) == slot
    none = num_tokens * top_k
    first = tl.min(tl.where(is_same, at, none), 1)
    return token, first, first < none, tl.min(first, 0) == pair


@triton.jit
def up_kernel(
    x, slots, out, values, biases, values_stride, biases_stride,
    num_tokens, top_k, rows, cols, alpha, limit,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr,
    INTERLEAVED: tl.constexpr, GATE: tl.constexpr,
    TOKENS: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Compute the gated intermediate [pairs, rows / 2] of inputs [tokens, cols]."""
    pair = tl.program_id(0)
    slot = tl.load(slots + pair).to(tl.int64)
    token, out_pair, is_token, is_first = _work_of(slots, pair, slot, num_tokens, top_k, TOKENS, CHOICES)
    if (slot >= 0) & is_first:
        DTYPE: tl.constexpr = x.dtype.element_ty
        values, biases = values + slot * values_stride, biases + slot * biases_stride
        half = rows // 2
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        gate_row, up_row = row, row + half
        if INTERLEAVED:
            gate_row, up_row = row * 2, row * 2 + 1
        # A gate's row past the half would be another row's up.
        gate_row, up_row = tl.where(row < half, gate_row, rows), tl.where(row < half, up_row, rows)
        gate = _times(x, token * cols, is_token, values, biases, gate_row, rows, cols,
                      TRANSPOSED, HAS_BIAS, DTYPE, COLS, DOT)  # fmt: skip
        up = _times(x, token * cols, is_token, values, biases, up_row, rows, cols,
                    TRANSPOSED, HAS_BIAS, DTYPE, COLS, DOT)  # fmt: skip
        if GATE == _SILU:
            inner = _rounded(gate / (1.0 + tl.exp(-gate)), DTYPE) * up
        else:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
            scaled = _rounded(gate * alpha, DTYPE)
            glu = _rounded(gate * _rounded(1.0 / (1.0 + tl.exp(-scaled)), DTYPE), DTYPE)
            inner = _rounded(up + 1.0, DTYPE) * glu
        at = out_pair[None, :] * half + row[:, None]
        tl.store(out + at, inner.to(DTYPE), is_token[None, :] & (row < half)[:, None])


@triton.jit
def down_kernel(
    x, slots, out, values, biases, values_stride, biases_stride,
    num_tokens, top_k, rows, cols,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Compute the experts' outputs [pairs, rows] from the intermediate [pairs, cols]."""
    pair = tl.program_id(0)
    slot = tl.load(slots + pair).to(tl.int64)
    _, at_pair, is_token, is_first = _work_of(slots, pair, slot, num_tokens, top_k, TOKENS, CHOICES)
    if (slot >= 0) & is_first:
        DTYPE: tl.constexpr = x.dtype.element_ty
        values, biases = values + slot * values_stride, biases + slot * biases_stride
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        result = _times(x, at_pair * cols, is_token, values, biases, row, rows, cols,
                        TRANSPOSED, HAS_BIAS, DTYPE, COLS, DOT)  # fmt: skip
        at = at_pair[None, :] * rows + row[:, None]
        tl.store(out + at, result.to(DTYPE), is_token[None, :] & (row < rows)[:, None])


@triton.jit
def sum_kernel(
    outputs, ids, slots, weights, out, top_k, width, CHOICES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Compute a token's weighted sum in ascending expert id, rounded after each expert."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    token = tl.program_id(0)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    choice = tl.arange(0, CHOICES)
    is_choice = choice < top_k
    id = tl.load(ids + token * top_k + choice, is_choice, 2**30).to(tl.int32)
    comes_before = (id[None, :] < id[:, None]) | ((id[None, :] == id[:, None]) & (choice[None, :] < choice[:, None]))
    rank = tl.sum(comes_before.to(tl.int32), 1)
    total = tl.zeros([COLS], tl.float32)
    for place in range(top_k):
        pair = token * top_k + tl.sum(tl.where(rank == place, choice, 0), 0)
        slot = tl.load(slots + pair)
        weight = tl.load(weights + pair).to(tl.float32)
        value = tl.load(outputs + pair * width + col, col < tl.where(slot >= 0, width, 0), 0.0).to(tl.float32)
        total = _rounded(total + _rounded(value * weight, DTYPE), DTYPE)
    tl.store(out + token * width + col, total.to(DTYPE), col < width)


def experts(
    form: ExpertForm,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    pool: torch.Tensor,
) -> torch.Tensor:
    """See `expert_form.experts`. hidden: [tokens, hidden]. ids, slots, weights: [tokens, k]."""
    num_tokens, top_k = ids.shape
    pairs, inner_width = ids.numel(), form.up.rows // 2
    hidden, slots = hidden.contiguous(), slots.contiguous()
    inner = torch.empty(pairs, inner_width, dtype=hidden.dtype, device=hidden.device)
    outputs = torch.empty(pairs, form.down.rows, dtype=hidden.dtype, device=hidden.device)
    total = torch.empty_like(hidden)
    is_dot = num_tokens > 1
    choices = triton.next_power_of_2(top_k)
    tile = {
        "TOKENS": _DOT_TOKENS if is_dot else 1, "CHOICES": choices, "ROWS": _ROWS, "DOT": is_dot, "num_warps": 4,
    }  # fmt: skip
    up_kernel[(pairs, triton.cdiv(inner_width, _ROWS))](
        hidden, slots, inner, *_parts(form.up, pool), num_tokens, top_k, form.up.rows, form.up.cols,
        form.alpha, form.limit, **_kind(form.up), INTERLEAVED=form.is_interleaved, GATE=form.gate,
        COLS=_columns(form.up, is_dot), **tile,
    )  # fmt: skip
    down_kernel[(pairs, triton.cdiv(form.down.rows, _ROWS))](
        inner, slots, outputs, *_parts(form.down, pool), num_tokens, top_k, form.down.rows, form.down.cols,
        **_kind(form.down), COLS=_columns(form.down, is_dot), **tile,
    )  # fmt: skip
    sum_kernel[(num_tokens, triton.cdiv(form.down.rows, _SUM_COLUMNS))](
        outputs, ids.contiguous(), slots, weights.contiguous(), total, top_k, form.down.rows,
        CHOICES=choices, COLS=_SUM_COLUMNS, num_warps=2,
    )  # fmt: skip
    return total


def _parts(form: MatrixForm, pool: torch.Tensor) -> tuple[torch.Tensor | int, ...]:
    """Return values and biases of slot 0, and the stride of each to the next slot, in items."""
    views = [
        pool.view(dtype)[:, max(at, 0) // dtype.itemsize :]
        for at, dtype in ((form.at, form.dtype), (form.bias_at, form.bias_dtype))
    ]
    return (*views, *(view.stride(0) for view in views))


def _kind(form: MatrixForm) -> dict[str, bool]:
    return {"TRANSPOSED": form.is_transposed, "HAS_BIAS": form.bias_at >= 0}


def _columns(form: MatrixForm, is_dot: bool) -> int:
    """Number of columns multiplied at a time: 16 bytes a lane for whole rows."""
    most = 64 if is_dot else 256
    return max(min(triton.next_power_of_2(form.cols), most), 16)
