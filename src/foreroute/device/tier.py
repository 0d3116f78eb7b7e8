"""The device control plane: decode steps that find, copy and compute experts on the device, without the host.

It is the counterpart of the host's `MoeStep` (engine/moe_step.py). Per MoE layer (`DeviceTier._decode`): the planner
finds a slot for every routed expert, and missing ones are copied; then prefetches for the next layer are copied during
this layer's compute, and the next layer waits for them. On a GPU no tensor is copied to the host, so that a whole step
can be one CUDA graph (generation/graph_decoder.py); CPU tests run the same code with plain operations.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.device.overlap import Branch, LayerBuffers, branch_of
from foreroute.device.paging import CopyList, PagingState
from foreroute.engine.approximation import Approximation
from foreroute.engine.interfaces import EngineStats, StepInfo
from foreroute.predict.base import RouterSample, TokenGuess
from foreroute.predict.governor import Governor
from foreroute.transfer.memory import Arena


class Paging(Protocol):
    """The operations of device/paging.py, or a GPU's with the same signatures."""

    def plan(
        self, state: PagingState, layer: int, ids: torch.Tensor, slots: torch.Tensor, copies: CopyList, *, arrived: bool
    ) -> None:
        """Find a slot for each of `layer`'s `ids` [tokens, k]; see `paging.plan`: state, slots, copies, arrived."""

    def plan_prefetch(
        self, state: PagingState, layer: int, guesses: torch.Tensor, copies: CopyList, *, arrived: bool
    ) -> None:
        """Find slots for `layer`'s `guesses` [n]; see `paging.plan_prefetch`: state, copies, arrived."""

    def fetch(
        self,
        arena_address: int,
        record_offsets: torch.Tensor,
        copies: CopyList,
        slots: torch.Tensor,
        *,
        record_bytes: int,
    ) -> None:
        """See `paging.fetch`. slots: [num_slots, slot_bytes]. record_offsets: [num_keys]."""

    def release(self, state: PagingState) -> None:
        """Release the last plan's experts."""


# (layer, hidden [tokens, hidden], ids [tokens, k], their slots int32 [tokens, k], weights [tokens, k])
# -> the weighted sum [tokens, hidden]; slots are -1 for ids that are no expert.
SlotMath = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# (layer, its router's input and output, width) -> the guess for the next layer, or None.
GuessNext = Callable[[int, RouterSample, int], TokenGuess | None]


@dataclass(frozen=True)
class _RowBuffers:
    """Output buffers for one batch size, made once, so that a graph can be replayed.

    slots: per layer int32 [rows, k]. demanded, prefetches: per layer, what to copy.
    """

    slots: list[torch.Tensor]
    demanded: list[CopyList]
    prefetches: list[CopyList]


class DeviceTier:
    """A `MoeEngine` whose device pages the experts of one loaded model.

    Args:
        pool: uint8 [num_slots, slot_bytes] on the device. arena: holds every expert, in the order of `keys`.
        top_k: per MoE layer. guess: None prefetches nothing. width: experts guessed per row; top-k when None.
        slot_math: computes experts from their slots in the pool.
        clear: drops slot_math's references to the pool.

    Attributes:
        is_prefill: whether the current (or last) step computes a prompt.
        policies: only exact. governor: None, as prefetch is not governed here.
        most_rows: the most rows of a decode step that the pool can serve; larger ones are computed as prefill.
    """

    def __init__(
        self,
        table: ExpertTable,
        arena: Arena,
        keys: Sequence[int],
        pool: torch.Tensor,
        state: PagingState,
        paging: Paging,
        slot_math: SlotMath,
        buffers: LayerBuffers,
        top_k: Sequence[int],
        guess: GuessNext | None,
        policies: Approximation,
        *,
        width: int | None = None,
        clear: Callable[[], None] = lambda: None,
    ) -> None:
        self.table = table
        self.policies = policies
        self.governor: Governor | None = None
        self.state = state
        self.buffers = buffers
        self.is_prefill = False
        self._stats = EngineStats()
        self._arena = arena
        self._pool: torch.Tensor | None = pool
        self._paging = paging
        self._slot_math = slot_math
        self._clear = clear
        self._top_k = list(top_k)
        self._guess = guess if state.staging_slots > 0 else None
        self._guess_widths = [width or k for k in top_k]
        self._last_layer = len(table.layers) - 1
        self._branch: Branch = branch_of(pool.device)
        self._rows: dict[int, _RowBuffers] = {}
        # Whether the layer before prefetched for the current one, so that copies may be in flight.
        self._is_prefetching = False
        self._has_seeds = False
        offsets = torch.full((table.num_keys,), -1, dtype=torch.int64)
        offsets[torch.tensor(keys)] = torch.arange(len(keys)) * arena.record_bytes
        self._record_offsets = offsets.to(pool.device)
        room = state.num_slots - state.staging_slots
        self.most_rows = room // max(top_k)

    def begin_step(self, info: StepInfo) -> None:
        """See `MoeEngine`."""
        self.policies.of_rows(info.num_rows)
        self.is_prefill = info.is_prefill
        phase = self._stats.prefill if self.is_prefill else self._stats.decode
        phase.steps += 1
        phase.tokens += info.num_tokens
        # The step before may have been interrupted anywhere.
        self._branch.join()
        self._is_prefetching = False
        if self.is_prefill:
            self.buffers.begin()
            self._has_seeds = True
        else:
            self.prepare_decode()

    def prepare_decode(self) -> None:
        """Do the host's work before a decode step: after a prompt, load the experts it used most into the pool."""
        self.is_prefill = False
        if self._has_seeds:
            self.seed()

    def compute(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `MoeEngine`. hidden: [tokens, hidden]. ids, weights: [tokens, k]."""
        if self.is_prefill or len(ids) > self.most_rows:
            return self.buffers.compute(layer, hidden, ids, weights)
        return self._decode(layer, hidden, ids, weights)

    def _decode(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = self._row_buffers(len(ids))
        slots, demanded = rows.slots[layer], rows.demanded[layer]
        self._paging.plan(self.state, layer, ids, slots, demanded, arrived=not self._is_prefetching)
        self._fetch(demanded)
        # Wait for this layer's prefetches: the code below reads their slots.
        self._branch.join()
        self._is_prefetching = False
        guess = None
        if self._guess is not None and layer < self._last_layer:
            guess = self._guess(layer, RouterSample(hidden, ids, weights), self._guess_widths[layer + 1])
        if guess is not None:
            prefetches = rows.prefetches[layer]
            # Ordered by rank: the first choices of all rows, then their second ones, and so on.
            self._paging.plan_prefetch(self.state, layer + 1, guess.ids.t().flatten(), prefetches, arrived=True)
            # Behind the demand's copies, concurrently with this layer's compute.
            self._branch.fork(lambda: self._fetch(prefetches))
            self._is_prefetching = True
        return self._slot_math(layer, hidden, ids, slots, weights)

    def seed(self) -> None:
        """Load the experts that prompts used most since the last call into the pool. Waits for the device."""
        self._has_seeds = False
        num_experts = self.table.num_experts
        uses = self.buffers.uses[:, :num_experts].clone().cpu()
        self.buffers.forget()
        most = min(self.state.num_slots - self.state.staging_slots, int((uses > 0).sum()))
        chosen = uses.flatten().sort(descending=True, stable=True).indices[:most]
        counters = self.state.counters.clone()
        for layer in range(self._last_layer + 1):
            experts = chosen[chosen // num_experts == layer] % num_experts
            if not len(experts):
                continue
            device = self.state.counters.device
            ids, slots = experts.to(device)[None], torch.empty(1, len(experts), dtype=torch.int32, device=device)
            copies = CopyList.create(len(experts), device)
            self._paging.plan(self.state, layer, ids, slots, copies, arrived=True)
            self._fetch(copies)
        self._paging.release(self.state)
        # These loads are not demands: restore the counters.
        self.state.counters.copy_(counters)

    def replayed(self, num_rows: int) -> None:
        """Count a captured step of `num_rows` that was launched without `begin_step`."""
        self._stats.decode.steps += 1
        self._stats.decode.tokens += num_rows

    def snapshot(self) -> EngineStats:
        """Return a copy of all counts since the model was loaded. Waits for the device."""
        counts, stats = self.state.counts(), self._stats
        assert counts["shortages"] == 0, f"the pool was too small for a step that was computed all the same: {counts}"
        nbytes = self.table.slot_bytes
        decode = stats.decode
        decode.hits, decode.late_hits, decode.misses = counts["hits"], counts["late_hits"], counts["misses"]
        decode.demand_loads, decode.demand_bytes = counts["misses"], counts["misses"] * nbytes
        decode.prefetch_loads, decode.prefetch_bytes = counts["prefetched"], counts["prefetched"] * nbytes
        decode.prefetch_used, decode.prefetch_wasted = counts["prefetch_used"], counts["prefetch_wasted"]
        decode.layers = decode.steps * (self._last_layer + 1)
        widest = self.table.num_experts
        prefill = stats.prefill
        prefill.demand_loads = self.buffers.whole_layers * widest + self.buffers.single_experts
        prefill.demand_bytes = prefill.demand_loads * nbytes
        stats.evictions = counts["evictions"]
        stats.read_bytes = decode.demand_bytes + decode.prefetch_bytes + prefill.demand_bytes
        return copy.deepcopy(stats)

    def close(self) -> None:
        """Free the pool and host memory, after the device has finished. A second call does nothing."""
        if self._pool is None:
            return
        self._branch.join()
        if self._pool.device.type == "cuda":
            torch.cuda.synchronize(self._pool.device)
        self.buffers.close()
        self._clear()
        self._pool = None
        self._rows.clear()
        self._arena.close()

    def _fetch(self, copies: CopyList) -> None:
        assert self._pool is not None, "the tier has been closed"
        self._paging.fetch(
            self._arena.address, self._record_offsets, copies, self._pool, record_bytes=self._arena.record_bytes
        )

    def _row_buffers(self, num_rows: int) -> _RowBuffers:
        if num_rows not in self._rows:
            device = self.state.counters.device
            self._rows[num_rows] = _RowBuffers(
                [torch.empty(num_rows, k, dtype=torch.int32, device=device) for k in self._top_k],
                [CopyList.create(num_rows * k, device) for k in self._top_k],
                [CopyList.create(num_rows * width, device) for width in [*self._guess_widths[1:], 1]],
            )
        return self._rows[num_rows]
