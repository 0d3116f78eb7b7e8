"""Compute experts from their slots in the pool, for the device control plane: plainly, in a graph, or by kernels.

Kernels need the form of a family's experts, which is found by trying.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from foreroute.checkpoint.layouts import ExpertLayout
from foreroute.kernels.slot_views import TORCH_DTYPES, SlotViews
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.kernels.torch.layer import RowsSum
from foreroute.kernels.triton.expert_form import CLAMPED, SILU, ExpertForm, MatrixForm

_ROWS, _WIDTH = 5, 64


class PlainSlotMath:
    """Computes expert after expert, ascending, with the bits of transformers' eager experts. Copies ids to the host."""

    def __init__(self, views: SlotViews, math: Sequence[ExpertMath]) -> None:
        self._views = views
        self._math = list(math)

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """See `tier.SlotMath`. hidden: [tokens, hidden]. ids, slots, weights: [tokens, k]."""
        slot_of: dict[int, int] = {}
        routed = []
        for experts, places in zip(ids.tolist(), slots.tolist(), strict=True):
            routed.append([expert if slot >= 0 else -1 for expert, slot in zip(experts, places, strict=True)])
            slot_of.update(zip(experts, places, strict=True))
        wanted = sorted({expert for row in routed for expert in row} - {-1})
        output = RowsSum(
            self._math[layer],
            lambda slot: self._views.operands(layer, slot),
            hidden,
            routed,
            weights,
            self._views.most_at_once(layer),
        )
        output.add([(expert, slot_of[expert]) for expert in wanted])
        return output.total()


class GatheredSlotMath:
    """Batched torch operations over a step's experts, without a copy to the host: a graph can capture it.

    The experts are gathered from the pool first, which reads and writes them once more than a kernel that reads slots
    directly. Outputs are summed in ascending expert id, as in the resident model; products may round differently.

    Args:
        pool: uint8 [num_slots, slot_bytes]. layouts, math: one per MoE layer. dtype: of compute.
    """

    def __init__(
        self, pool: torch.Tensor, layouts: Sequence[ExpertLayout], math: Sequence[ExpertMath], dtype: torch.dtype
    ) -> None:
        self._math = list(math)
        self._dtype = dtype
        of_layout: dict[ExpertLayout, list[torch.Tensor]] = {}
        for layout in layouts:
            if layout not in of_layout:
                of_layout[layout] = _parts_of_all(pool, layout)
        self._parts = [of_layout[layout] for layout in layouts]

    def clear(self) -> None:
        """Drop the views of the pool."""
        self._parts.clear()

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """See `tier.SlotMath`. hidden: [tokens, hidden]. ids, slots, weights: [tokens, k]."""
        math, (num_rows, top_k) = self._math[layer], ids.shape
        order = ids.argsort(-1)
        slots = slots.gather(-1, order)
        is_expert = slots >= 0
        weights = weights.gather(-1, order) * is_expert
        at = slots.clamp(min=0).flatten().long()
        parts = [part.index_select(0, at).to(self._dtype) for part in self._parts[layer]]

        def product(rows: torch.Tensor, part_at: int, bias_at: int) -> torch.Tensor:
            matrix = parts[part_at] if math.transposes(part_at) else parts[part_at].transpose(1, 2)
            out = torch.bmm(rows[:, None], matrix)[:, 0]
            return out if bias_at < 0 else out + parts[bias_at]

        rows = hidden.repeat_interleave(top_k, 0)
        inner = math.gate(product(rows, math.up_at, math.up_bias_at))
        outputs = product(inner, math.down_at, math.down_bias_at).view(num_rows, top_k, -1)
        # A slot clamped above may hold anything, infinities too.
        weighted = torch.where(is_expert[..., None], outputs * weights[..., None], 0).to(hidden.dtype)
        total = torch.zeros_like(hidden)
        for place in weighted.unbind(1):
            total += place
        return total


def _parts_of_all(pool: torch.Tensor, layout: ExpertLayout) -> list[torch.Tensor]:
    """View each part of all slots' experts: [num_slots, *shape] over the pool."""
    return [
        pool[:, part.offset : part.offset + part.nbytes].view(TORCH_DTYPES[part.dtype]).unflatten(1, part.shape)
        for part in layout.parts
    ]


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
        _matrix(layout, at, bias_at, math.transposes(at))
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
    return MatrixForm(rows, cols, part.offset, bias, dtype, bias_dtype, is_transposed)


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
