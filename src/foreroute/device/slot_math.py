"""Compute experts from their slots in the pool, for the device control plane: plainly, or capturable in a graph."""

from collections.abc import Sequence

import torch

from foreroute.checkpoint.layouts import ExpertLayout
from foreroute.kernels.slot_views import TORCH_DTYPES, SlotViews
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.kernels.torch.sums import RowsSum


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
            matrix = parts[part_at] if math.is_transposed else parts[part_at].transpose(1, 2)
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
