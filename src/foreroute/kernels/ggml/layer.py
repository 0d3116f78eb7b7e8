"""Compute a MoE layer by ggml's kernels, straight from the blocks in the slots.

A row's products have the same bits whichever rows and experts share its step, so that budgets, prefetch and batches
change no output. Sums are in f32, in ascending expert key.
"""

import math
from collections import deque
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, wait

import numpy as np
import torch

from foreroute.errors import CorruptCheckpointError
from foreroute.kernels.ggml.experts import FormGraphs
from foreroute.kernels.ggml.lanes import one_thread
from foreroute.kernels.layer import ExpertListener, ExpertSlots, LayerSum, Placed
from foreroute.kernels.torch.layer import group_by_expert
from foreroute.types import ExpertId

# Memory for the rows of all experts that a short prompt computes in one graph.
_MOST_AT_ONCE_BYTES = 2**26
# Of an expert: its inputs and outputs [n, hidden], the outputs by gate weights, and whether they are all numbers.
_Computed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]
# (an expert's key, inputs [n, hidden], outputs [n, hidden])
Check = Callable[[int, torch.Tensor, torch.Tensor], None]


class GgmlLayer:
    """Computes one MoE layer's experts from blocks: see `LayerKernels`.

    Args:
        layer: its index among the MoE layers. base: the key of its expert 0.
        graphs: of its form of experts, shared by layers of the same.
    Attributes:
        decodes: whether a step of single tokens runs: its rows keep blocks, so that their bits are the same in any
            company.
    """

    streams_only = False

    def __init__(self, layer: int, base: int, graphs: FormGraphs) -> None:
        self._layer, self._base = layer, base
        self._graphs: FormGraphs | None = graphs
        # One more than are computed: a lane that ends has the next at once.
        self.num_held = graphs.lanes.count + 1
        self.decodes: Callable[[], bool] = lambda: False

    def begin(self, hidden: torch.Tensor, routed: Sequence[Sequence[int]], weights: torch.Tensor) -> LayerSum:
        """See `LayerKernels`. hidden: [tokens, hidden]. weights: [tokens, k]."""
        assert self._graphs is not None, "the pool has been closed"
        kind = TokenBlockSum if len(routed) == 1 and min(routed[0]) >= 0 else BlockSum
        return kind(self._graphs, hidden, routed, weights, self._check)

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
        if listener is None and self._graphs.scratch_bytes(ids.numel()) <= _MOST_AT_ONCE_BYTES:
            placed = self._all_in_blocks(experts, keys, ids)
            if placed:
                routed = [[key if (key := self._base + one) in placed else -1 for one in row] for row in ids.tolist()]
                at_once = BlockSum(self._graphs, hidden, routed, weights, self._check)
                at_once.add([*placed.items()])
                return at_once.total()
        with one_thread():
            return self._on_lanes(self._graphs, experts, keys, hidden, ids, weights, listener)

    def _on_lanes(
        self,
        graphs: FormGraphs,
        experts: ExpertSlots,
        keys: Sequence[int],
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        listener: ExpertListener | None,
    ) -> torch.Tensor:
        """The same sum, one expert per lane at a time; see `stream`."""
        floats, gates, may_convert = hidden.float(), weights.float(), not self.decodes()
        total = torch.zeros_like(floats)
        under_way = deque[tuple[int, torch.Tensor, Future[_Computed]]]()

        def add_first() -> None:
            key, tokens, computed = under_way[0]
            rows, outputs, weighted, is_finite = computed.result()
            under_way.popleft()
            if not is_finite:
                self._check(key, rows, outputs)
            if listener is not None:
                listener(self._layer, key - self._base, outputs.to(hidden.dtype))
            total.index_add_(0, tokens, weighted)

        def compute(slot: int, tokens: torch.Tensor, positions: torch.Tensor) -> _Computed:
            rows = floats.index_select(0, tokens)
            outputs = graphs.on_lane(rows, slot, may_convert=may_convert)
            return rows, outputs, outputs * gates[tokens, positions, None], math.isfinite(outputs.sum())

        try:
            for key, tokens, positions in group_by_expert(ids, keys, self._base):
                if len(under_way) == experts.most_held:
                    add_first()
                slot = experts.slot_of(key)
                under_way.append((key, tokens, graphs.lanes.submit(compute, slot, tokens, positions)))
            while under_way:
                add_first()
        finally:
            # After an error too: what a lane reads may not be freed under it.
            wait([computed for _, _, computed in under_way])
            graphs.count_waits_anew()
        return total.to(hidden.dtype)

    def _all_in_blocks(self, experts: ExpertSlots, keys: Sequence[int], ids: torch.Tensor) -> dict[int, int]:
        """Key -> slot of all `keys` if every one is resident and has too few rows for bf16; else empty."""
        assert self._graphs is not None, "the pool has been closed"
        most = int(ids[(ids >= 0) & (ids <= keys[-1] - self._base)].bincount().max()) if keys else 0
        if not keys or self._graphs.converts(most, may_convert=not self.decodes()):
            return {}
        placed = experts.resident(keys)
        return placed if len(placed) == len(keys) else {}

    def stored(self, slot: int) -> list[torch.Tensor]:
        """The bytes that the kernels read of the expert in `slot`: matrices, then biases."""
        assert self._graphs is not None, "the pool has been closed"
        return self._graphs.stored(slot)

    def close(self) -> None:
        """See `LayerKernels`."""
        self._graphs = None

    def _check(self, key: int, rows: torch.Tensor, outputs: torch.Tensor) -> None:
        """Raises CorruptCheckpointError: an expert's `outputs` [n, hidden] are no numbers, though its `rows` are."""
        if (~outputs.isfinite().all(1) & rows.isfinite().all(1)).any():
            raise CorruptCheckpointError(
                f"{ExpertId(self._layer, key - self._base)} gives outputs that are no numbers, of inputs that are: a "
                "scale in its blocks is NaN, infinite or far too large. The file is damaged, or its quantiser was at "
                "fault: download it again, or take another."
            )


class TokenBlockSum:
    """A `LayerSum` of one token: its experts' outputs lie in ascending key, and are added in that order.

    Args:
        hidden: [1, hidden]. weights: [1, k]. routed: the token's keys, all of them experts.
        check: given an expert's key, inputs and outputs, raises where only the outputs are no numbers.
    """

    def __init__(
        self,
        graphs: FormGraphs,
        hidden: torch.Tensor,
        routed: Sequence[Sequence[int]],
        weights: torch.Tensor,
        check: Check,
    ) -> None:
        self._check = check
        self._graphs, self._dtype = graphs, hidden.dtype
        self._hidden = hidden.float().contiguous()
        row, gates = routed[0], weights.tolist()[0]
        self._order = sorted(range(len(row)), key=row.__getitem__)
        self._keys = [row[at] for at in self._order]
        self._gates = [gates[at] for at in self._order]
        # The whole sum, where all experts came at once.
        self._total: torch.Tensor | None = None
        self._is_finite = False
        self._slots: dict[int, int] = {}
        graphs.reserve(len(row))

    def add(self, experts: Sequence[Placed]) -> None:
        """Compute these experts: straight to the sum where these are all, to their places where they are neighbours."""
        slots = dict(experts)
        ranks = [rank for rank, key in enumerate(self._keys) if key in slots]
        if not ranks:
            return
        graphs, count, first = self._graphs, len(ranks), ranks[0]
        is_sum = count == len(self._keys)
        graph = graphs.of(1, count, is_sum=is_sum)
        graph.ids[0] = [slots[self._keys[rank]] for rank in ranks]
        if is_sum:
            self._total, self._slots = torch.empty((1, graphs.form.hidden), dtype=torch.float32, device="cpu"), slots
            graph.set_gates(self._gates)
            graph.run(self._hidden.data_ptr(), self._total.data_ptr())
            self._is_finite = graph.is_finite
            return
        if ranks[-1] - first + 1 == count:
            graph.run(self._hidden.data_ptr(), graphs.address + 4 * graphs.form.hidden * first)
            return
        apart = torch.empty((count, graphs.form.hidden), dtype=torch.float32, device="cpu")
        graph.run(self._hidden.data_ptr(), apart.data_ptr())
        graphs.outputs[ranks] = apart.numpy()

    def substitute(self, keys: Sequence[int], vectors: torch.Tensor) -> None:
        """Use `vectors` [keys, hidden] as the outputs of experts `keys`."""
        for key, vector in zip(keys, vectors.float().numpy(), strict=True):
            for rank, own in enumerate(self._keys):
                if own == key:
                    self._graphs.outputs[rank] = vector

    def total(self) -> torch.Tensor:
        """Return the weighted sum [1, hidden]."""
        total = self._total
        if total is None:
            outputs = self._graphs.outputs[: len(self._gates)]
            total = torch.from_numpy(_weighted_sum(outputs, np.array(self._gates, dtype=np.float32)))[None]
        # NaN and infinities last through sums.
        if not self._is_finite and not math.isfinite(total.sum()):
            for rank, key in enumerate(self._keys):
                self._check(key, self._hidden, self._outputs_of(rank))
        return total if self._dtype == torch.float32 else total.to(self._dtype)

    def _outputs_of(self, rank: int) -> torch.Tensor:
        """[1, hidden] of one expert; once more where only the sum is kept."""
        if self._total is None:
            return torch.from_numpy(self._graphs.outputs[rank : rank + 1])
        return self._graphs.in_blocks(self._hidden, self._slots[self._keys[rank]])


def _weighted_sum(outputs: np.ndarray, gates: np.ndarray) -> np.ndarray:
    """Sum `outputs` [experts, hidden] by `gates` [experts], row after row: [hidden]."""
    total: np.ndarray = np.add.reduce(outputs * gates[:, None], axis=0)
    return total


class BlockSum:
    """A `LayerSum` of several tokens: outputs lie in ascending expert key per token, and are added in that order.

    Args:
        hidden: [tokens, hidden]. weights: [tokens, k]. routed: per token its keys; negative ones are no expert.
        check: see `TokenBlockSum`.
    """

    def __init__(
        self,
        graphs: FormGraphs,
        hidden: torch.Tensor,
        routed: Sequence[Sequence[int]],
        weights: torch.Tensor,
        check: Check,
    ) -> None:
        self._check = check
        self._graphs, self._dtype = graphs, hidden.dtype
        self._hidden = hidden.float().contiguous()
        self._weights = weights
        # Per token the positions of its top-k in ascending key.
        self._order = [sorted((at for at, key in enumerate(row) if key >= 0), key=row.__getitem__) for row in routed]
        self._routed = routed
        self._outputs = np.empty((len(routed), len(routed[0]), graphs.form.hidden), dtype=np.float32)

    def add(self, experts: Sequence[Placed]) -> None:
        """Compute these experts for their rows."""
        slots = dict(experts)
        places = self._places(slots)
        if not places:
            return
        rows = self._hidden.index_select(0, torch.tensor([token for token, _, _ in places]))
        outputs = np.empty((len(places), self._graphs.form.hidden), dtype=np.float32)
        graph = self._graphs.of(len(places), 1)
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
                total[token] = _weighted_sum(self._outputs[token, : len(order)], gates[token, order])
        if not math.isfinite(total.sum()):
            for token, order in enumerate(self._order):
                row = slice(token, token + 1)
                for rank, at in enumerate(order):
                    self._check(self._routed[token][at], self._hidden[row], torch.from_numpy(self._outputs[row, rank]))
        return torch.from_numpy(total).to(self._dtype)

    def _places(self, keys: Container[int]) -> list[tuple[int, int, int]]:
        """(token, rank among its experts, key) of every row that these experts compute, by token."""
        return [
            (token, rank, row[at])
            for token, (row, order) in enumerate(zip(self._routed, self._order, strict=True))
            for rank, at in enumerate(order)
            if row[at] in keys
        ]
