"""Compute experts by kernels that read them from their slots; find the form of a family's experts by trying."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from foreroute.checkpoint.layouts import ExpertLayout
from foreroute.kernels.slot_views import TORCH_DTYPES
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.kernels.triton.expert_form import CLAMPED, FLOAT, SILU, ExpertForm, MatrixForm

_ROWS, _WIDTH = 5, 64


class KernelSlotMath:
    """A `tier.SlotMath` that calls `experts` of kernels/triton, with each layer's form.

    Args:
        experts: `kernels.triton.experts.experts`, or the reference with the same arguments.
        pool: uint8 [num_slots, slot_bytes]. forms: one per MoE layer.
    """

    def __init__(self, experts: Callable[..., torch.Tensor], pool: torch.Tensor, forms: Sequence[ExpertForm]) -> None:
        self._experts = experts
        self._pool: torch.Tensor | None = pool
        self._forms = list(forms)

    def clear(self) -> None:
        """Drop the reference to the pool."""
        self._pool = None

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum [tokens, hidden]; ids, slots, weights: [tokens, k]."""
        return self._experts(self._forms[layer], hidden, ids, slots, weights, self._pool)


def form_of(module: Any, layout: ExpertLayout, math: ExpertMath, dtype: torch.dtype) -> ExpertForm | None:
    """Find the kernels' form of a layer's experts (layout and gate); None if no form gives the family's results.

    Args:
        module: the family's experts module, for its gate's constants. layout, math: of its experts.
        dtype: of compute; experts stored in another have no form.
    """
    if any(TORCH_DTYPES[part.dtype] != dtype for part in layout.parts):
        return None
    matrices = [
        _matrix(layout, at, bias_at, math.is_transposed)
        for at, bias_at in ((math.up_at, math.up_bias_at), (math.down_at, math.down_bias_at))
    ]
    alpha, limit = float(getattr(module, "alpha", 1.702)), float(getattr(module, "limit", 7.0))
    for is_interleaved in (False, True):
        for gate in (SILU, CLAMPED):
            form = ExpertForm(matrices[0], matrices[1], is_interleaved, gate, alpha, limit)
            if _gates_alike(form, math):
                return form
    return None


def _matrix(layout: ExpertLayout, at: int, bias_at: int, is_transposed: bool) -> MatrixForm:
    part = layout.parts[at]
    cols, rows = part.shape if is_transposed else part.shape[::-1]
    dtype = TORCH_DTYPES[part.dtype]
    bias = -1 if bias_at < 0 else layout.parts[bias_at].offset
    bias_dtype = dtype if bias_at < 0 else TORCH_DTYPES[layout.parts[bias_at].dtype]
    return MatrixForm(
        FLOAT, rows, cols, part.offset, bias_at=bias, dtype=dtype, bias_dtype=bias_dtype, is_transposed=is_transposed
    )


def _gates_alike(form: ExpertForm, math: ExpertMath) -> bool:
    """Whether the form's gate equals the family's, on numbers that exceed its limit."""
    inner = torch.randn(_ROWS, 2 * _WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 6
    if form.is_interleaved:
        gate, up = inner[:, ::2], inner[:, 1::2]
    else:
        gate, up = inner.chunk(2, -1)
    if form.gate == SILU:
        ours = torch.nn.functional.silu(gate) * up
    else:
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
        ours = (up + 1) * (gate * torch.sigmoid(gate * form.alpha))
    with torch.no_grad():
        theirs = math.gate(inner)
    return theirs.shape == ours.shape and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
