"""Compute a MoE layer by torch, bit for bit as transformers' eager experts."""

from collections.abc import Callable, Iterator, Sequence

import torch

from foreroute.kernels.layer import ExpertListener, ExpertSlots, LayerSum
from foreroute.kernels.slot_views import SlotViews
from foreroute.kernels.torch.experts import ExpertMath, OneToken, Operands
from foreroute.kernels.torch.sums import RowsSum, TokenSum, is_distinct

# The family's own forward: (expert key -> operands, called in ascending order; hidden, ids, weights) -> the sum.
FamilyForward = Callable[[Callable[[int], Operands], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def group_by_expert(
    ids: torch.Tensor, keys: Sequence[int], base: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield, for each of `keys` (ascending), the tokens routed to it and their positions in the top-k.

    Sorted by position and then token, as transformers' eager experts order them: the order of rows in a product can
    change its bits.

    Args:
        ids: [tokens, k] int64. base: the key of the layer's expert 0.
    """
    num_tokens = ids.shape[0]
    flat = ids.t().reshape(-1)
    order = torch.argsort(flat, stable=True)
    sorted_ids = flat[order]
    wanted = torch.tensor([key - base for key in keys], device=ids.device)
    starts = torch.searchsorted(sorted_ids, wanted).tolist()
    ends = torch.searchsorted(sorted_ids, wanted, right=True).tolist()
    for key, start, end in zip(keys, starts, ends, strict=True):
        rows = order[start:end]
        yield key, rows % num_tokens, rows // num_tokens


class TorchLayer:
    """Computes one MoE layer's experts by torch: see `LayerKernels`.

    Args:
        layer: its index among the MoE layers. base: the key of its expert 0.
        views: the slots as tensors, shared by all layers.
        math: computes one expert; None where ours is not proven equal to the family's.
        workspace: for one token, shared by layers of one shape; None where `math` is.
        family_forward: computes the layer where `math` is None.

    Attributes:
        streams_only: the family's own forward computes this layer.
    """

    def __init__(
        self,
        layer: int,
        base: int,
        views: SlotViews,
        math: ExpertMath | None,
        workspace: OneToken | None,
        family_forward: FamilyForward,
    ) -> None:
        self.views = views
        self.streams_only = math is None
        self._layer = layer
        self._base = base
        self._math = math
        self._family_forward = family_forward

        def operands_of(slot: int) -> Operands:
            return views.operands(layer, slot)

        self._operands = operands_of
        self._token = None if math is None or workspace is None else TokenSum(workspace, math, operands_of)

    def begin(self, hidden: torch.Tensor, routed: Sequence[Sequence[int]], weights: torch.Tensor) -> LayerSum:
        """See `LayerKernels`. hidden: [tokens, hidden]. weights: [tokens, k]."""
        assert self._math is not None, "a layer without maths of ours is streamed"
        if len(routed) == 1 and self._token is not None and is_distinct(routed[0]):
            return self._token.begin(hidden, routed[0], weights)
        return RowsSum(self._math, self._operands, hidden, routed, weights, self.views.most_at_once(self._layer))

    def stream(
        self,
        experts: ExpertSlots,
        keys: Sequence[int],
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        listener: ExpertListener | None = None,
    ) -> torch.Tensor:
        """See `LayerKernels`. hidden: [tokens, hidden]. ids, weights: [tokens, k]."""
        if self._math is None:
            return self._family_forward(lambda key: self._operands(experts.slot_of(key)), hidden, ids, weights)
        total = torch.zeros_like(hidden)
        for key, tokens, positions in group_by_expert(ids, keys, self._base):
            outputs = self._math(hidden[tokens], self._operands(experts.slot_of(key)))
            if listener is not None:
                listener(self._layer, key - self._base, outputs)
            rows = outputs * weights[tokens, positions, None]
            total.index_add_(0, tokens, rows.to(total.dtype))
        return total

    def close(self) -> None:
        """See `LayerKernels`."""
        self.views.clear()
