"""Experts computed where they lie in the pool, for the device control plane: the plain way, and one for graphs."""

from collections.abc import Sequence

import torch

from foreroute.checkpoint.layouts import ExpertLayout
from foreroute.kernels.slot_views import TORCH_DTYPES, SlotViews
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.kernels.torch.sums import RowsSum


class PlainSlotMath:
    """Expert after expert in ascending order, as transformers' eager experts: bits are the same. Reads slots back."""

    def __init__(self, views: SlotViews, math: Sequence[ExpertMath]) -> None:
        self._views = views
        self._math = list(math)

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """See `device_tier.SlotMath`."""
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
    """Torch's own operations, batched over a step's experts and without a read-back: a graph can hold it.

    The experts are gathered from the pool first, which reads and writes them once more than a kernel that reads through
    the slots would. Sums go in ascending expert id, as the resident model's do; products may be summed otherwise.

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
        """Let go of the pool."""
        self._parts.clear()

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """See `device_tier.SlotMath`."""
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
        # A slot that was made up above may hold anything, infinities too.
        weighted = torch.where(is_expert[..., None], outputs * weights[..., None], 0).to(hidden.dtype)
        total = torch.zeros_like(hidden)
        for place in weighted.unbind(1):
            total += place
        return total


def _parts_of_all(pool: torch.Tensor, layout: ExpertLayout) -> list[torch.Tensor]:
    """Each part of whatever experts the slots hold: [num_slots, *shape], views of the pool."""
    return [
        pool[:, part.offset : part.offset + part.nbytes].view(TORCH_DTYPES[part.dtype]).unflatten(1, part.shape)
        for part in layout.parts
    ]
