"""Compute a MoE layer by ggml's kernels, straight from the blocks in the slots.

A row's products have the same bits whichever rows and experts share its step, so that budgets, prefetch and batches
change no output. Sums are in f32, in ascending expert key.
"""

import math
from collections.abc import Callable, Container, Sequence

import numpy as np
import torch

from foreroute.errors import CorruptCheckpointError
from foreroute.kernels.ggml.experts import ExpertGraphs
from foreroute.kernels.ggml.form import ExpertForm
from foreroute.kernels.layer import ExpertListener, ExpertSlots, LayerSum, Placed
from foreroute.kernels.torch.layer import group_by_expert
from foreroute.types import ExpertId


class GgmlLayer:
    """Computes one MoE layer's experts from blocks: see `LayerKernels`.

    Args:
        layer: its index among the MoE layers. base: the key of its expert 0.
        form: of its experts in a slot. graphs: of the pool, shared by all layers.
    Attributes:
        decodes: whether a step of single tokens runs: its rows keep blocks, so that their bits are the same in any
            company.
    """

    streams_only = False

    def __init__(self, layer: int, base: int, form: ExpertForm, graphs: ExpertGraphs) -> None:
        self._layer, self._base, self._form = layer, base, form
        self._graphs: ExpertGraphs | None = graphs
        self.decodes: Callable[[], bool] = lambda: False

    def begin(self, hidden: torch.Tensor, routed: Sequence[Sequence[int]], weights: torch.Tensor) -> LayerSum:
        """See `LayerKernels`. hidden: [tokens, hidden]. weights: [tokens, k]."""
        assert self._graphs is not None, "the pool has been closed"
        return BlockSum(self._graphs, self._form, hidden, routed, weights, self._check)

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
        assert self._graphs is not None, "the pool has been closed"
        floats, gates, may_convert = hidden.float(), weights.float(), not self.decodes()
        total = torch.zeros_like(floats)
        for key, tokens, positions in group_by_expert(ids, keys, self._base):
            rows, slot = floats.index_select(0, tokens), experts.slot_of(key)
            outputs = self._graphs.stream(self._form, rows, slot, may_convert=may_convert)
            self._check(key, rows, outputs)
            if listener is not None:
                listener(self._layer, key - self._base, outputs.to(hidden.dtype))
            total.index_add_(0, tokens, outputs * gates[tokens, positions, None])
        return total.to(hidden.dtype)

    def close(self) -> None:
        """See `LayerKernels`."""
        self._graphs = None

    def _check(self, key: int, rows: torch.Tensor, outputs: torch.Tensor) -> None:
        """Raises CorruptCheckpointError: an expert's `outputs` [n, hidden] are no numbers, though its `rows` are."""
        # NaN and infinities last through a sum.
        if math.isfinite(outputs.sum()):
            return
        if (~outputs.isfinite().all(1) & rows.isfinite().all(1)).any():
            raise CorruptCheckpointError(
                f"{ExpertId(self._layer, key - self._base)} gives outputs that are no numbers, of inputs that are: a "
                "scale in its blocks is NaN, infinite or far too large. The file is damaged, or its quantiser was at "
                "fault: download it again, or take another."
            )


class BlockSum:
    """A `LayerSum`: outputs lie in ascending expert key per token, and are added in that order.

    Args:
        hidden: [tokens, hidden]. weights: [tokens, k]. routed: per token its keys; negative ones are no expert.
    """

    def __init__(
        self,
        graphs: ExpertGraphs,
        form: ExpertForm,
        hidden: torch.Tensor,
        routed: Sequence[Sequence[int]],
        weights: torch.Tensor,
        check: Callable[[int, torch.Tensor, torch.Tensor], None],
    ) -> None:
        self._check = check
        self._graphs, self._form, self._dtype = graphs, form, hidden.dtype
        self._hidden = hidden.float().contiguous()
        self._weights = weights
        # Per token the positions of its top-k in ascending key.
        self._order = [sorted((at for at, key in enumerate(row) if key >= 0), key=row.__getitem__) for row in routed]
        self._routed = routed
        self._outputs = np.empty((len(routed), len(routed[0]), form.hidden), dtype=np.float32)

    def add(self, experts: Sequence[Placed]) -> None:
        """Compute these experts for their rows."""
        if not experts:
            return
        if len(self._routed) == 1:
            self._add_to_token(experts)
            return
        slots = dict(experts)
        places = self._places(slots)
        rows = self._hidden.index_select(0, torch.tensor([token for token, _, _ in places]))
        outputs = np.empty((len(places), self._form.hidden), dtype=np.float32)
        graph = self._graphs.of(self._form, len(places), 1)
        graph.ids[:, 0] = [slots[key] for _, _, key in places]
        graph.run(rows.data_ptr(), outputs.ctypes.data)
        self._outputs[[token for token, _, _ in places], [rank for _, rank, _ in places]] = outputs

    def substitute(self, keys: Sequence[int], vectors: torch.Tensor) -> None:
        """Use `vectors` [keys, hidden] as the outputs of experts `keys`, for every token routed to them."""
        given = dict(zip(keys, vectors.float().numpy(), strict=True))
        for token, rank, key in self._places(given):
            self._outputs[token, rank] = given[key]

    def total(self) -> torch.Tensor:
        """Return the weighted sum [tokens, hidden]."""
        total = np.zeros(self._hidden.shape, dtype=np.float32)
        gates = self._weights.float().numpy()
        for token, order in enumerate(self._order):
            if order:
                weighted = self._outputs[token, : len(order)] * gates[token, order, None]
                np.add.reduce(weighted, axis=0, out=total[token])
        if not math.isfinite(total.sum()):
            self._find_no_numbers()
        return torch.from_numpy(total).to(self._dtype)

    def _find_no_numbers(self) -> None:
        for token, order in enumerate(self._order):
            for rank, at in enumerate(order):
                row = slice(token, token + 1)
                self._check(self._routed[token][at], self._hidden[row], torch.from_numpy(self._outputs[row, rank]))

    def _places(self, keys: Container[int]) -> list[tuple[int, int, int]]:
        """(token, rank among its experts, key) of every row that these experts compute, by token."""
        return [
            (token, rank, row[at])
            for token, (row, order) in enumerate(zip(self._routed, self._order, strict=True))
            for rank, at in enumerate(order)
            if row[at] in keys
        ]

    def _add_to_token(self, experts: Sequence[Placed]) -> None:
        """For one token: a row through all these experts, straight to its place where they are neighbours."""
        slots = dict(experts)
        row = self._routed[0]
        ranks = [rank for rank, at in enumerate(self._order[0]) if row[at] in slots]
        graph = self._graphs.of(self._form, 1, len(ranks))
        graph.ids[0] = [slots[row[self._order[0][rank]]] for rank in ranks]
        outputs = self._outputs[0]
        if ranks[-1] - ranks[0] + 1 == len(ranks):
            graph.run(self._hidden.data_ptr(), outputs[ranks[0] :].ctypes.data)
            return
        apart = np.empty((len(ranks), self._form.hidden), dtype=np.float32)
        graph.run(self._hidden.data_ptr(), apart.ctypes.data)
        outputs[ranks] = apart
