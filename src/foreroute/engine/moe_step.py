"""The forward pass of one MoE layer: use resident experts, load missing ones, prefetch for the next layer.

Read `_compute_pinned` first: it computes a decoded token. Outputs are summed in ascending expert id, the order of
transformers' eager experts, for the same bits. Prompts, and steps that demand more experts than the pool holds, take
`_compute_streamed`: their experts pass through the pool one after the other.
"""

from collections.abc import Callable, Sequence
from math import inf

import torch

from foreroute.engine.approximation import Approximation
from foreroute.engine.interfaces import EngineStats, Phase, RoutingListener, StepInfo
from foreroute.engine.pool import ExpertPool
from foreroute.engine.prefetcher import Prefetcher
from foreroute.kernels.layer import ExpertListener, LayerKernels, LayerSum
from foreroute.predict.governor import Governor

# Slots of a stream beside those that compute holds: more reads ahead would hide no more time, and only take slots.
_AHEAD_SLOTS = 3


class MoeStep:
    """The engine of one loaded model: a `MoeEngine` that runs on the host. Built by loading/load.py.

    Args:
        kernels: one per MoE layer; computes its experts.
        policies: how decoding treats misses.
        free_slots: frees the pool's memory, after the readers have stopped.
        hits_first: compute resident experts while the others are read; False waits for all of them first.
        prefill_prefetch_from: routed tokens per expert of a layer from which prompts prefetch too; 0: always.

    Attributes:
        is_prefill: whether the current (or last) step computes a prompt.
        routing_listener, expert_listener: called with each layer's routing, and with the outputs of streamed experts;
            None by default. They must change nothing.
    """

    def __init__(
        self,
        pool: ExpertPool,
        kernels: Sequence[LayerKernels],
        prefetcher: Prefetcher,
        policies: Approximation,
        *,
        free_slots: Callable[[], None] = lambda: None,
        hits_first: bool = True,
        prefill_prefetch_from: float = inf,
    ) -> None:
        self.pool = pool
        self.kernels = list(kernels)
        self.prefetcher = prefetcher
        self.policies = policies
        self.routing_listener: RoutingListener | None = None
        self.expert_listener: ExpertListener | None = None
        self._free_slots = free_slots
        self._hits_first = hits_first
        self._prefill_prefetch_from = prefill_prefetch_from
        self._info = StepInfo("decode", 1, 1)
        self.is_prefill = False
        # Still True when a step begins: the one before was interrupted by an error or Ctrl-C, at any line.
        self._is_mid_step = False
        # A step's whole demand must fit beside the prefetches in flight.
        self._most_pinned = [part.num_slots - part.staging_slots for part in pool.by_layer]

    @property
    def phase(self) -> Phase:
        """Of the current (or last) step."""
        return self._info.phase

    @property
    def governor(self) -> Governor | None:
        """The current governor of prefetch; None when prefetch is not governed."""
        return self.prefetcher.governor

    def begin_step(self, info: StepInfo) -> None:
        """Begin a forward pass.

        Raises:
            PolicyError: policies were set for another number of rows.
        """
        self.policies.of_rows(info.num_rows)
        if self._is_mid_step:
            self.pool.reset()
        self._is_mid_step = True
        self._info, self.is_prefill = info, info.is_prefill
        self.pool.begin_step(info)
        self.prefetcher.begin_step(info)
        self._is_mid_step = False

    def expect(self, token_ids: torch.Tensor, num_rows: int) -> None:
        """Prefetch the first layer's experts of tokens [rows x positions] that the next step is going to compute.

        For a draft, between two steps: reads then overlap the drafting of later tokens.
        """
        if not self._is_mid_step:
            self.prefetcher.guess_first(token_ids, num_rows)

    def compute(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute the weighted sum of the routed experts of MoE layer `layer`.

        Args:
            hidden: [tokens, hidden]. weights: [tokens, k].
            ids: [tokens, k] int64; those out of the layer's range are ignored.
        Returns:
            [tokens, hidden], in `hidden`'s dtype.
        Raises:
            ReadError, ChecksumError: an expert could not be read; the model stays usable, and its pool is emptied.
        """
        pool, padding = self.pool, self._info.padding
        if self._is_mid_step:
            pool.reset()
        self._is_mid_step = True
        if padding is not None:
            ids = ids.masked_fill(padding[:, None], pool.keys.widths[layer])
        # The layer's only copy from device to host.
        routed = pool.keys.keys_of(layer, ids.tolist())
        if pool.observers:
            pool.begin_layer(layer, routed, weights)
        self._show(layer, hidden, ids, weights)
        total = self._compute(layer, routed, hidden, ids, weights)
        if pool.observers:
            pool.end_layer()
        if layer == len(self.kernels) - 1:
            self.prefetcher.end_step()
        self._is_mid_step = False
        return total

    def snapshot(self) -> EngineStats:
        """Return a copy of all counts since the model was loaded."""
        return self.pool.snapshot()

    def close(self) -> None:
        """Stop the readers and free the pool; experts cannot be computed afterwards."""
        try:
            self.pool.close()
        finally:
            for kernels in self.kernels:
                kernels.close()
            self._free_slots()

    def _show(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Pass the layer's routing to the listener and the predictor."""
        if self.routing_listener is not None:
            self.routing_listener(layer, hidden, ids, weights)
        if layer == self.prefetcher.first_layer and self._info.padding is None:
            self.prefetcher.see_first(hidden, self._info.num_rows, goes_on=self._info.phase == "verify")

    def _compute(
        self, layer: int, routed: list[list[int]], hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        # A verify step is exact too: under a policy, what it accepts would depend on the drafted tokens beside it.
        policies = None if self._info.phase != "decode" or self.policies.is_exact else self.policies
        if policies is not None:
            chosen = ids
            ids, weights = policies.route(layer, ids, weights)
            if ids is not chosen:
                routed = self.pool.keys.keys_of(layer, ids.tolist())
        keys = _distinct(routed)
        if not keys:
            return torch.zeros_like(hidden)
        self.pool.settle()
        self.pool.cancel_mispredicted(layer, keys)
        room = self._most_pinned[layer] - len(self.pool.by_layer[layer].deferred)
        if self.is_prefill or self.kernels[layer].streams_only or len(keys) > room:
            if policies is not None:
                policies.see(layer, hidden, ids, weights)
            return self._compute_streamed(layer, keys, hidden, ids, weights)
        return self._compute_pinned(layer, keys, routed, hidden, ids, weights, policies)

    def _compute_pinned(
        self,
        layer: int,
        keys: list[int],
        routed: list[list[int]],
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        policies: Approximation | None,
    ) -> torch.Tensor:
        """Pin all experts that the layer waits for at once, and compute each as it arrives."""
        pool, absent = self.pool, list[int]()
        if policies is not None:
            absent = policies.not_waited_for(layer, keys, routed, weights, pool.residency.contains_ready)
            keys = [key for key in keys if key not in absent]
        ready, waiting = pool.demand(layer, keys)
        # Demand first: a prefetch must never delay a needed read.
        self._prefetch_next(layer, hidden, ids, weights, policies)
        while waiting and not self._hits_first:
            ready += pool.wait(waiting)
        output = self.kernels[layer].begin(hidden, routed, weights)
        if ready:
            output.add(ready)
        while waiting:
            output.add(pool.wait(waiting))
        if policies is not None and absent:
            keys = keys + substitute_missing(pool, policies, layer, absent, output)
        total = output.total()
        pool.release(keys)
        return total

    def _prefetch_next(
        self,
        layer: int,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        policies: Approximation | None,
    ) -> None:
        """Prefetch for the next layer: its guessed experts, or its route where that is fixed already (`paper`)."""
        route = None if policies is None else policies.see(layer, hidden, ids, weights)
        if route is None:
            self.prefetcher.guess_next(layer, hidden, ids, weights)
        else:
            self.prefetcher.prefetch_route(layer + 1, route.ids)

    def _compute_streamed(
        self, layer: int, keys: list[int], hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Stream the experts in ascending order, reading each at most once."""
        stream = ExpertStream(self.pool, layer, keys, self.kernels[layer].num_held)
        width = self.pool.keys.widths[layer]
        if self.is_prefill and int((ids < width).sum()) >= self._prefill_prefetch_from * width:
            # Queued behind this layer's reads: it delays those that the ring asks for later by one read at most.
            self.prefetcher.guess_next(layer, hidden, ids, weights)
        total = self.kernels[layer].stream(stream, keys, hidden, ids, weights, self.expert_listener)
        stream.close()
        return total


def _distinct(routed: Sequence[Sequence[int]]) -> list[int]:
    """Return the distinct keys that any token is routed to, ascending; negative ones (no expert) are left out."""
    keys = sorted(set(routed[0]) if len(routed) == 1 else {key for row in routed for key in row})
    return keys if not keys or keys[0] >= 0 else [key for key in keys if key >= 0]


def substitute_missing(
    pool: ExpertPool, policies: Approximation, layer: int, absent: Sequence[int], output: LayerSum
) -> list[int]:
    """Add a layer's `absent` experts to its `output` sum, without waiting for any of them.

    Those loaded by now are computed after all, as that costs no wait. The others are substituted, with deferred loads.

    Args:
        pool, policies: of the model. absent: keys of `layer` that the policies do not wait for.
    Returns:
        The keys that were pinned, for the caller to release.
    """
    missing, pinned = list(absent), list[int]()
    while arrived := pool.pin_arrived(missing):
        output.add(arrived)
        pinned += [key for key, _ in arrived]
        missing = [key for key in missing if key not in pinned]
    if missing:
        output.substitute(missing, policies.vectors(layer, pool.keys.experts_of(layer, missing)))
        pool.substitute(missing)
    return pinned


class ExpertStream:
    """Slots of one layer's experts `keys` (ascending), each read once: call `slot_of` in that order, then `close`.

    Resident experts are used in place. Missing ones are read into free slots, and then through a small ring of borrowed
    slots, so that a long prompt does not evict the experts that decoding needs. Resident experts are held from the
    beginning, read ones a few at a time: asking for the next one releases the first of `most_held`.

    Args:
        num_held: experts whose slots are to be valid together.
    Attributes:
        most_held: as many, or fewer, so that one slot is left to read into.
    """

    def __init__(self, pool: ExpertPool, layer: int, keys: Sequence[int], num_held: int = 1) -> None:
        self._pool = pool
        ready, self._waiting, self._queue, ring = pool.admit(layer, keys, _AHEAD_SLOTS + num_held)
        self._ready = dict(ready)  # key -> slot: pinned ones, and those in the ring
        self._ring = frozenset(ring)
        self._free = ring
        self._held = list[int]()
        self.most_held = num_held if not ring else max(1, min(num_held, len(ring) - 1))
        self._top_up()

    def slot_of(self, key: int) -> int:
        """Return the slot of expert `key`; blocks until it is loaded.

        Raises:
            ReadError, ChecksumError: it could not be read.
        """
        if key not in self._held:
            if len(self._held) == self.most_held:
                self._release_first()
            self._held.append(key)
            self._top_up()
        while key not in self._ready:
            self._ready.update(self._pool.wait(self._waiting))
            self._top_up()
        return self._ready[key]

    def resident(self, keys: Sequence[int]) -> dict[int, int]:
        """Return key -> slot of those of `keys` that are pinned; asked before `slot_of` releases any."""
        return {key: slot for key in keys if (slot := self._ready.get(key, -1)) >= 0 and slot not in self._ring}

    def close(self) -> None:
        """Wait for the reads to end, then return all borrowed slots and release pinned experts."""
        while self._held:
            self._release_first()
        self._pool.give_back(list(self._ring))
        self._pool.release([key for key, slot in self._ready.items() if slot not in self._ring])
        self._ready = {}

    def _release_first(self) -> None:
        key = self._held.pop(0)
        slot = self._ready.pop(key, -1)
        if slot in self._ring:
            self._free.append(slot)
        elif slot >= 0:
            self._pool.release([key])

    def _top_up(self) -> None:
        """Start reads while the ring has free slots."""
        while self._queue and self._free:
            key, slot = self._queue.pop(0), self._free.pop()
            self._waiting[key] = slot
            self._pool.load_borrowed(key, slot)
