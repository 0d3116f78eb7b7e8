"""Many tokens at once: the experts that a chunk needs pass by in ascending order, each read once.

What the pool holds is used where it is. What it lacks goes to slots that are free, and then through a small ring of
borrowed ones, so that a long prompt does not push out the experts that decoding lives on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from foreroute.residency.slots import FREE, READY

if TYPE_CHECKING:
    from foreroute.engine.moe_step import Runtime
    from foreroute.engine.stats import PhaseStats
    from foreroute.transfer.base import Completion

# Reads kept in flight ahead of the maths: more hide no more, they only take slots.
_RING_SLOTS = 4


def group_by_expert(
    ids: torch.Tensor, keys: Sequence[int], base: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each of `keys`, ascending: the tokens routed to it and their positions in the top-k.

    Sorted by position and then token, as transformers' eager experts order them: the order of rows in a product can
    change its bits.
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


class ExpertStream:
    """The experts `keys` (ascending) of one layer, one after the other; call `operands` in that order, then `close`.

    At most one expert is lent at a time: asking for the next one gives the previous one back.

    Attributes:
        found, missed: those of the keys that were there, and that were not.
    """

    def __init__(
        self, runtime: Runtime, layer: int, keys: Sequence[int], phase: PhaseStats, clock: Callable[[], float]
    ) -> None:
        self._runtime = runtime
        self._residency = runtime.residency
        self._layer = layer
        self._phase = phase
        self._clock = clock
        self._leased: set[int] = set()
        self._loading: set[int] = set()  # into the pool
        self._ring_loading: dict[int, int] = {}
        self._ring_ready: dict[int, int] = {}
        self._ring_free: list[int] = []
        self._ring: list[int] = []
        self._current = -1
        self._key_nbytes = runtime.key_nbytes
        self.found: list[int] = []
        self.missed: list[int] = []
        self._queue = self._admit(keys)
        self._top_up()

    def _admit(self, keys: Sequence[int]) -> list[int]:
        """Lease what is there, load into free slots what fits, borrow a ring for the rest; returns the rest."""
        residency = self._residency
        most = residency.num_slots - _RING_SLOTS
        present = [key for key in keys if residency.state(key) == READY][: max(0, most)]
        hits, late, misses = residency.demand(present)
        assert not late, "readers are idle when a stream starts"
        assert not misses, "what is READY is leased"
        self._leased.update(hits)
        held = set(hits)
        rest = [key for key in keys if key not in held]
        self.found, self.missed = hits, rest
        self._phase.hits += len(hits)
        self._phase.misses += len(rest)
        if len(rest) > residency.num_free:
            self._ring = residency.borrow(min(_RING_SLOTS, len(rest)))
            self._ring_free = list(self._ring)
            assert self._ring, f"no slot to stream through: {residency!r}"
        kept = [key for key in rest if residency.state(key) == FREE][: residency.num_free]
        _, _, loads = residency.demand(kept)
        self._loading.update(key for key, _ in loads)
        for key, slot in loads:
            self._start(key, slot)
        return [key for key in rest if key not in self._loading]

    def operands(self, key: int) -> tuple[torch.Tensor, ...]:
        """Expert `key`'s tensors as the maths wants them; blocks until its bytes are there.

        Raises:
            ReadError, ChecksumError: they could not be read.
        """
        if key != self._current:
            self._give_back_current()
            self._current = key
            self._top_up()
        slot = self._ring_ready.get(key, -1)
        while slot < 0 and key not in self._leased:
            self._await_one()
            self._top_up()
            slot = self._ring_ready.get(key, -1)
        return self._runtime.views.operands(self._layer, slot if slot >= 0 else self._residency.slot_of(key))

    def close(self) -> None:
        """Give every slot back, after the reads into them have ended."""
        self._give_back_current()
        while self._ring_loading:
            for completion in self._told(self._runtime.transfer.wait()):
                self._book(completion.key, completion.error)
        self._residency.give_back(self._ring)
        self._residency.release(list(self._leased))
        self._leased.clear()
        self._ring = []

    def _give_back_current(self) -> None:
        key, self._current = self._current, -1
        slot = self._ring_ready.pop(key, -1)
        if slot >= 0:
            self._ring_free.append(slot)
        elif key in self._leased:
            self._leased.remove(key)
            self._residency.release([key])

    def _top_up(self) -> None:
        """Start the next reads for which the ring has room."""
        while self._queue and self._ring_free:
            key = self._queue.pop(0)
            slot = self._ring_free.pop()
            self._ring_loading[key] = slot
            self._start(key, slot)

    def _start(self, key: int, slot: int) -> None:
        self._runtime.transfer.demand(key, slot)
        self._phase.demand_loads += 1
        self._phase.demand_bytes += self._key_nbytes[key]

    def _await_one(self) -> None:
        started = self._clock()
        completions = self._runtime.await_completions()
        self._runtime.stalled_since(started)
        failure: Exception | None = None
        for completion in self._told(completions):
            failure = self._book(completion.key, completion.error) or failure
        if failure is not None:
            raise failure

    def _told(self, completions: Sequence[Completion]) -> Sequence[Completion]:
        if self._runtime.tracing is not None:
            self._runtime.tracing.arrived(completions)
        return completions

    def _book(self, key: int, error: Exception | None) -> Exception | None:
        if key in self._ring_loading:
            slot = self._ring_loading.pop(key)
            if error is None:
                self._ring_ready[key] = slot
            return error
        if key not in self._loading:
            # A guess for the next layer: nobody here asked for it, and a failed one is no error.
            if error is None:
                self._residency.loaded(key)
            else:
                self._residency.fail(key)
            return None
        self._loading.discard(key)
        if error is not None:
            self._residency.fail(key)
            return error
        self._residency.loaded(key)
        self._residency.lease(key)
        self._leased.add(key)
        return None


# The family's own forward over a stream of experts: (stream, hidden, ids, weights) -> [tokens, hidden].
FamilyForward = Callable[[ExpertStream, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
