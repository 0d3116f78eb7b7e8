"""The pool of experts: slots, reads, counts, observers and clock of one loaded model. Read `demand` and `wait` first.

Moving an expert takes four updates: the residency's state, a request to a reader, a count, and a call of each observer.
They are made here together, and only here: all other code asks the pool for experts.
"""

import copy
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from threading import Lock

import torch

from foreroute.engine.interfaces import EngineStats, PhaseStats, StepInfo, StepObserver
from foreroute.kernels.layer import Placed
from foreroute.residency.sized import SizedResidency, by_layer
from foreroute.residency.slots import FREE, LOADING, READY, Residency
from foreroute.transfer.base import Completion, Transfer
from foreroute.types import ExpertKeys


class ExpertPool:
    """Track which experts are resident, and load, pin and evict them. Not thread-safe, but for add/remove_observer.

    Args:
        keys: of the model's experts. key_nbytes: stored bytes of each expert, by its key.
        residency, transfer: owned by the pool from now on.
        keeps_across_tokens: False evicts every expert after its layer (on-demand loading).
        first_layer: the first MoE layer of a decode step. clock: seconds, monotonic.

    Attributes:
        by_layer: each MoE layer's residency. stats: all counts. phase: those of the current phase.
        observers: called on each event of the current step; empty, and without cost, until one is added.
    """

    def __init__(
        self,
        keys: ExpertKeys,
        key_nbytes: Sequence[int],
        residency: Residency | SizedResidency,
        transfer: Transfer,
        *,
        keeps_across_tokens: bool = True,
        first_layer: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.keys = keys
        self.residency = residency
        self.by_layer = by_layer(residency, len(keys.widths))
        self.transfer = transfer
        self.clock = clock
        self.stats = EngineStats()
        self.phase: PhaseStats = self.stats.decode
        self.observers: tuple[StepObserver, ...] = ()
        self._key_nbytes = key_nbytes
        self._keeps_across_tokens = keeps_across_tokens
        self._first_layer = first_layer
        # add_observer and remove_observer change this list alone; `observers` becomes it when the next step begins.
        self._next_observers: tuple[StepObserver, ...] = ()
        self._observers_lock = Lock()
        # Per layer, the queued prefetches that its router has not confirmed or contradicted yet.
        self._unconfirmed: list[list[int]] = [[] for _ in keys.widths]
        # Used and wasted prefetches, as the residency had counted them when they were last added to a phase.
        self._recorded = (0, 0)
        # Experts that were substituted and not read since.
        self._substituted: set[int] = set()
        # The deferred loads that were queued as such; the others began as prefetches that came too late.
        self._queued_deferred: set[int] = set()
        # Keys being read into borrowed slots, which the residency does not track.
        self._loading_borrowed: set[int] = set()

    def begin_step(self, info: StepInfo) -> None:
        """Begin a forward pass: update the observers, decay frequencies and process finished reads."""
        self.observers = self._next_observers
        self.record_outcomes()
        self.phase = phase = self.stats.of(info.phase)
        phase.steps += 1
        phase.tokens += info.num_tokens
        for observer in self.observers:
            observer.begin_step(info)
        self.residency.tick()
        self.settle()
        if not self._keeps_across_tokens:
            self.residency.drop(self.residency.ready_keys())

    def begin_layer(self, layer: int, routed: Sequence[Sequence[int]], weights: torch.Tensor) -> None:
        """Tell the observers that `layer` begins. routed: per token its expert keys. weights: [tokens, k]."""
        for observer in self.observers:
            observer.begin_layer(layer, routed, weights)

    def end_layer(self) -> None:
        """Tell the observers that the layer's experts have been computed."""
        for observer in self.observers:
            observer.end_layer()

    def demand(self, layer: int, keys: Sequence[int]) -> tuple[list[Placed], dict[int, int]]:
        """Pin the resident experts among `keys`, which `layer` routed to, and start to load the others.

        Args:
            keys: distinct; together they fit the pool beside the prefetched experts.
        Returns:
            ready: (key, slot) of the pinned experts. waiting: key -> slot of the others, for `wait`.
        """
        hits, in_flight, misses = self.by_layer[layer].demand(keys)
        self._count_lookup(layer, hits, in_flight, misses)
        if not (in_flight or misses):
            return hits, {}
        for key, _ in in_flight:
            self.transfer.promote(key)
        for key, slot in misses:
            self._load(key, slot)
        return hits, dict(in_flight + misses)

    def wait(self, waiting: dict[int, int]) -> list[Placed]:
        """Block until at least one expert of `waiting` is loaded; pin those that are, and remove them from `waiting`.

        Raises:
            ReadError, ChecksumError: one of them could not be read.
        """
        began_s = self.clock()
        try:
            while not (arrived := self._settle(self.transfer.wait(), waiting)):
                pass
        finally:
            self.stalled_since(began_s)
        return arrived

    def pin_arrived(self, keys: Sequence[int]) -> list[Placed]:
        """Pin those of `keys` that have been loaded by now, without waiting; they count as hits."""
        residency = self.residency
        if any(residency.state(key) == LOADING for key in keys):
            self.settle()
        arrived = [(key, residency.slot_of(key)) for key in keys if residency.state(key) == READY]
        for key, _ in arrived:
            residency.pin(key)
        if arrived:
            self.phase.hits += len(arrived)
            for observer in self.observers:
                observer.looked_up([key for key, _ in arrived], (), ())
        return arrived

    def release(self, keys: Sequence[int]) -> None:
        """Release these experts after they have been computed; they may be evicted again."""
        self.residency.release(keys)
        if not self._keeps_across_tokens:
            self.residency.drop(keys)

    def settle(self) -> None:
        """Process finished reads, without waiting. A failed prefetch raises only when its demand fails too."""
        if self.transfer.num_in_flight:
            self._settle(self.transfer.completed(), {})

    def drain(self) -> None:
        """Block until nothing is in flight."""
        if self.transfer.num_in_flight:
            began_s = self.clock()
            while self.transfer.num_in_flight:
                self._settle(self.transfer.wait(), {})
            self.stalled_since(began_s)

    def can_prefetch(self, layer: int) -> bool:
        """Whether prefetch is on and some expert of the layer is neither resident nor loading."""
        residency = self.by_layer[layer]
        return residency.staging_slots > 0 and residency.resident_per_layer[layer] < self.keys.widths[layer]

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Queue prefetches of `layer`'s guessed `experts` (distinct, best first) that are absent and have room."""
        for observer in self.observers:
            observer.guessed(layer, experts)
        base = self.keys.key(layer, 0)
        loads = self.by_layer[layer].prefetch([base + expert for expert in experts])
        for key, slot in loads:
            self.transfer.prefetch(key, slot)
            self._count_prefetch(key)
        self._unconfirmed[layer].extend(key for key, _ in loads)

    def substitute(self, keys: Sequence[int]) -> None:
        """Count these absent experts as substituted, and queue deferred loads of them."""
        self.phase.substituted += len(keys)
        for observer in self.observers:
            observer.substituted(keys)
        if self._keeps_across_tokens:
            self.defer(keys)

    def defer(self, keys: Sequence[int]) -> None:
        """Queue deferred loads of experts that are substituted the second time: else they might never be resident.

        The second time, not the first: that halves these reads and costs little, as most that recur are prefetched.
        """
        again = [key for key in keys if key in self._substituted]
        self._substituted.update(keys)
        if not again:
            return
        # Those without room now are tried again when they are next substituted.
        loads = self.residency.defer(again)
        self._substituted.difference_update(key for key, _ in loads)
        self._queued_deferred &= self.residency.deferred
        for observer in self.observers:
            observer.deferred([key for key, _ in loads])
        for key, slot in loads:
            self.transfer.defer(key, slot)
            self._queued_deferred.add(key)
            self._count_deferred(key)

    def cancel_mispredicted(self, layer: int, wanted: Collection[int]) -> None:
        """Cancel queued prefetches for `layer` whose keys its router did not choose (are not in `wanted`)."""
        unconfirmed = self._unconfirmed[layer]
        for key in unconfirmed:
            if key not in wanted and self.transfer.cancel(key):
                self.residency.cancel(key)
                self.phase.prefetch_cancelled += 1
                self._count_prefetch(key, -1)
        unconfirmed.clear()

    def cancel_queued(self) -> None:
        """Cancel every prefetch and deferred load that no reader has started."""
        for layer in range(len(self._unconfirmed)):
            self.cancel_mispredicted(layer, ())
        for key in list(self.residency.deferred):
            if self.transfer.cancel(key):
                self.residency.cancel(key)
                self._substituted.add(key)
                (self._count_deferred if key in self._queued_deferred else self._count_prefetch)(key, -1)

    def admit(
        self, layer: int, keys: Sequence[int], most_borrowed: int
    ) -> tuple[list[Placed], dict[int, int], list[int], list[int]]:
        """Begin to stream `layer`'s experts (`keys`, distinct): cancel queued reads, and pin or load what fits.

        Returns:
            ready: (key, slot), resident and pinned. waiting: key -> slot, loading into slots that were free.
            rest: keys without a slot. borrowed: up to `most_borrowed` slots to stream them through.
        """
        residency = self.by_layer[layer]
        in_flight = {key for key in keys if residency.state(key) == LOADING}
        self.cancel_queued()
        self.drain()
        resident = [key for key in keys if residency.state(key) == READY]
        ready = residency.demand(resident[: max(0, residency.num_slots - most_borrowed)]).hits
        pinned = {key for key, _ in ready}
        absent = [key for key in keys if key not in pinned]
        # Reads in flight when the layer began are late hits, though `drain` has completed them.
        late = [one for one in ready if one[0] in in_flight]
        hits = [one for one in ready if one[0] not in in_flight] if late else ready
        self._count_lookup(layer, hits, late, [(key, -1) for key in absent])
        borrowed: list[int] = []
        # What is resident beyond the most that are pinned passes through the borrowed slots too.
        if len(absent) > residency.num_free or any(residency.state(key) != FREE for key in absent):
            borrowed = residency.borrow(min(most_borrowed, len(absent)))
            assert borrowed, f"no slot to stream through: {residency!r}"
        placeable = [key for key in absent if residency.state(key) == FREE][: residency.num_free]
        waiting = dict(residency.demand(placeable).misses)
        for key, slot in waiting.items():
            self._load(key, slot)
        return ready, waiting, [key for key in absent if key not in waiting], borrowed

    def load_borrowed(self, key: int, slot: int) -> None:
        """Start to load expert `key` into a borrowed `slot`; `wait` returns it once it is loaded."""
        self._loading_borrowed.add(key)
        self._load(key, slot)

    def give_back(self, slots: Sequence[int]) -> None:
        """Wait for the reads into borrowed slots to end, then return `slots`."""
        while self._loading_borrowed:
            self._settle(self.transfer.wait(), {})
        self.residency.give_back(slots)

    def add_observer(self, observer: StepObserver) -> None:
        """Call this observer from the next step on; a second call does nothing. Any thread."""
        with self._observers_lock:
            others = [one for one in self._next_observers if one is not observer]
            self._next_observers = (*others, observer)

    def remove_observer(self, observer: StepObserver) -> None:
        """Stop calling this observer, from the next step on; does nothing if it was not added. Any thread."""
        with self._observers_lock:
            self._next_observers = tuple(one for one in self._next_observers if one is not observer)

    def count_step_without_prefetch(self) -> None:
        """Count a step in which the governor has switched prefetch off."""
        self.phase.steps_without_prefetch += 1

    def governed(self, share: float, why: str) -> None:
        """Tell the observers that the governor prefetches this `share` of the full width from now on, and `why`."""
        for observer in self.observers:
            observer.governed(share, why)

    def stalled_since(self, began_s: float) -> None:
        """Record a stall from `began_s` (by the clock) until now."""
        ended_s = self.clock()
        self.phase.stall_s += ended_s - began_s
        for observer in self.observers:
            observer.stalled(began_s, ended_s)

    def record_outcomes(self) -> None:
        """Add used and wasted prefetches since the last call to the current phase."""
        before, self._recorded = self._recorded, (self.residency.prefetch_used, self.residency.prefetch_wasted)
        _add_outcomes(self.phase, before, self._recorded)

    def snapshot(self) -> EngineStats:
        """Return a copy of all counts since the model was loaded. Thread-safe, as it changes nothing."""
        stats = copy.deepcopy(self.stats)
        now = self.residency.prefetch_used, self.residency.prefetch_wasted
        running = next(at for at, phase in enumerate(self.stats.phases) if phase is self.phase)
        _add_outcomes(stats.phases[running], self._recorded, now)
        stats.read_bytes, stats.read_s = self.transfer.bytes_read, self.transfer.busy_s
        stats.evictions, stats.read_retries = self.residency.evictions, self.transfer.retries
        return stats

    def reset(self) -> None:
        """Empty the pool after an interrupted step, whatever line it stopped at. The counts stay."""
        self.transfer.reset()
        self.residency.clear()
        for unconfirmed in self._unconfirmed:
            unconfirmed.clear()
        self._substituted.clear()
        self._queued_deferred.clear()
        self._loading_borrowed.clear()

    def close(self) -> None:
        """Stop the readers and end the observers. A second call does nothing."""
        self.transfer.close()
        with self._observers_lock:
            observers, self._next_observers = self._next_observers, ()
        self.observers = ()
        with ExitStack() as told:
            for observer in reversed(observers):
                told.callback(observer.end, self.snapshot())

    def _count_lookup(
        self, layer: int, hits: Sequence[Placed], in_flight: Sequence[Placed], misses: Sequence[Placed]
    ) -> None:
        phase = self.phase
        phase.hits += len(hits)
        is_prefill = phase is self.stats.prefill
        if not is_prefill:
            phase.layers += 1
        if in_flight or misses:
            phase.late_hits += len(in_flight)
            phase.misses += len(misses)
            if not is_prefill:
                phase.stalled_layers += 1
                phase.first_waited += len(in_flight) + len(misses) if layer == self._first_layer else 0
        if self.observers:
            kinds = [[key for key, _ in placed] for placed in (hits, in_flight, misses)]
            for observer in self.observers:
                observer.looked_up(*kinds)

    def _count_prefetch(self, key: int, by: int = 1) -> None:
        self.phase.prefetch_loads += by
        self.phase.prefetch_bytes += by * self._key_nbytes[key]

    def _count_deferred(self, key: int, by: int = 1) -> None:
        self.phase.deferred_loads += by
        self.phase.deferred_bytes += by * self._key_nbytes[key]

    def _load(self, key: int, slot: int) -> None:
        self.phase.demand_loads += 1
        self.phase.demand_bytes += self._key_nbytes[key]
        self.transfer.demand(key, slot)

    def _settle(self, completions: Sequence[Completion], waiting: dict[int, int]) -> list[Placed]:
        """Process finished reads; pin those of `waiting`, remove them from it and return them."""
        arrived: list[Placed] = []
        failure: Exception | None = None
        if completions:
            for observer in self.observers:
                observer.arrived(completions)
        for completion in completions:
            key, error = completion.key, completion.error
            is_borrowed = key in self._loading_borrowed
            if is_borrowed:
                self._loading_borrowed.remove(key)
            else:
                (self.residency.loaded if error is None else self.residency.fail)(key)
            if key not in waiting:
                continue
            if error is not None:
                failure = error
            else:
                if not is_borrowed:
                    self.residency.pin(key)
                arrived.append((key, waiting.pop(key)))
        if failure is not None:
            raise failure
        return arrived


def _add_outcomes(phase: PhaseStats, before: tuple[int, int], now: tuple[int, int]) -> None:
    phase.prefetch_used += now[0] - before[0]
    phase.prefetch_wasted += now[1] - before[1]
