"""Describe an expert's layout in its slot for kernels, and compute experts over slots in plain torch.

`experts` here is the reference of kernels/triton/experts.py. Both round where transformers' eager experts do: after
each product, each bias, the gate, and each expert's share of the sum, which goes in ascending expert id.
"""

from dataclasses import dataclass

import torch

SILU, CLAMPED = range(2)


@dataclass(frozen=True)
class MatrixForm:
    """One matrix [out, in] of `dtype` in a slot, row-major, or [in, out] where `is_transposed`.

    at, bias_at: offsets in bytes, whole 16s; -1 without a bias.
    """

    rows: int
    cols: int
    at: int
    bias_at: int = -1
    dtype: torch.dtype = torch.bfloat16
    bias_dtype: torch.dtype = torch.bfloat16
    is_transposed: bool = False


@dataclass(frozen=True)
class ExpertForm:
    """One expert: down(gate(up(x))).

    up: [2 * intermediate, hidden], gates first or, where `is_interleaved`, on even rows. down: [hidden, intermediate].
    gate: SILU: silu(gate) * up. CLAMPED, gpt-oss's: gate at most `limit`, up within +-`limit`,
        (up + 1) * gate * sigmoid(alpha * gate).
    """

    up: MatrixForm
    down: MatrixForm
    is_interleaved: bool = False
    gate: int = SILU
    alpha: float = 1.702
    limit: float = 7.0


def experts(
    form: ExpertForm,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    pool: torch.Tensor,
) -> torch.Tensor:
    """Compute the weighted sum [tokens, hidden] of routed experts of this `form`.

    Args:
        hidden: [tokens, hidden]. ids, slots, weights: [tokens, k]; a slot < 0 contributes nothing.
        pool: uint8 [num_slots, slot_bytes].
    """
    total = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for at in torch.argsort(ids[token], stable=True).tolist():
            slot = int(slots[token, at])
            if slot >= 0:
                row = _expert(form, hidden[token : token + 1], pool[slot])[0]
                total[token] += (row * weights[token, at]).to(hidden.dtype)
    return total


def _expert(form: ExpertForm, row: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    inner = _times(form.up, row, slot)
    half = form.up.rows // 2
    gate, up = (inner[:, ::2], inner[:, 1::2]) if form.is_interleaved else (inner[:, :half], inner[:, half:])
    if form.gate == SILU:
        inner = torch.nn.functional.silu(gate) * up
    else:
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
        inner = (up + 1) * (gate * torch.sigmoid(gate * form.alpha))
    return _times(form.down, inner, slot)


def _times(form: MatrixForm, row: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    out = (row.double() @ decoded(form, slot).double().t()).to(row.dtype)
    return out if form.bias_at < 0 else out + _part(slot, form.bias_at, (form.rows,), form.bias_dtype).to(row.dtype)


def decoded(form: MatrixForm, slot: torch.Tensor) -> torch.Tensor:
    """The matrix [out, in] of this `form` in `slot`, uint8 [slot_bytes], in float32."""
    shape = (form.cols, form.rows) if form.is_transposed else (form.rows, form.cols)
    stored = _part(slot, form.at, shape, form.dtype).float()
    return stored.t() if form.is_transposed else stored


def _part(slot: torch.Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return slot[at : at + nbytes].view(dtype).view(shape)
