"""Transfers around another one: reads in logical time, and a trace of every load."""

from collections.abc import Callable
from typing import Any

from foreroute.trace import Trace
from foreroute.transfer.base import Completion, Transfer
from foreroute.types import ExpertId

DEMAND, PREFETCH, DEFERRED = "demand", "prefetch", "deferred"


class _Forwarding:
    """Passes on all calls of a `Transfer` that a subclass does not change or record."""

    def __init__(self, inner: Transfer) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class LogicalTransfer(_Forwarding):
    """A `Transfer` whose completions depend only on the requests, not on how long they take.

    `completed` waits for everything in flight and returns it. `wait` waits for and returns the demand loads alone, or
    everything if there are none. Both in key order. Nothing is ever cancelled. Runs with the same requests get the same
    completions: for evaluations that have to be reproducible, at the cost of speed.
    """

    def __init__(self, inner: Transfer) -> None:
        super().__init__(inner)
        self._demanded: set[int] = set()
        self._held: list[Completion] = []

    @property
    def num_in_flight(self) -> int:
        """Number of requests whose completion has not been returned yet."""
        return self._inner.num_in_flight + len(self._held)

    def demand(self, key: int, slot: int) -> None:
        """Queue a demand load of `key` into `slot`, before all prefetches."""
        self._demanded.add(key)
        self._inner.demand(key, slot)

    def promote(self, key: int) -> None:
        """Turn a prefetch or deferred load into a demand."""
        self._demanded.add(key)
        self._inner.promote(key)

    def cancel(self, key: int) -> bool:
        """False: no read is cancelled, as whether it has started depends on time."""
        return False

    def completed(self) -> list[Completion]:
        """Wait for everything in flight, and return it."""
        while self._inner.num_in_flight:
            self._held.extend(self._inner.wait())
        return self._hand_out(self._held)

    def wait(self) -> list[Completion]:
        """Wait for all demand loads and return them; without any, for everything."""
        if not self._demanded:
            return self.completed()
        while not self._demanded <= {one.key for one in self._held}:
            self._held.extend(self._inner.wait())
        return self._hand_out([one for one in self._held if one.key in self._demanded])

    def reset(self) -> None:
        """Cancel what has not started, wait for what has, and drop all completions."""
        self._demanded.clear()
        self._held.clear()
        self._inner.reset()

    def _hand_out(self, over: list[Completion]) -> list[Completion]:
        keys = {one.key for one in over}
        self._held = [one for one in self._held if one.key not in keys]
        self._demanded -= keys
        return sorted(over, key=lambda one: one.key)


class TracedTransfer(_Forwarding):
    """Wraps a `Transfer` and writes loads, cancelled loads and evictions to the trace.

    Args:
        expert_id: a key -> its (layer, expert).
        clock: the trace's.
    """

    def __init__(
        self, inner: Transfer, trace: Trace, expert_id: Callable[[int], ExpertId], clock: Callable[[], float]
    ) -> None:
        super().__init__(inner)
        self._trace = trace
        self._expert_id = expert_id
        self._clock = clock
        self._asked: dict[int, tuple[str, int, float]] = {}  # key -> why, slot, time of the request
        self._holds: dict[int, int] = {}  # slot -> the key last loaded into it
        self._slot_of: dict[int, int] = {}

    def demand(self, key: int, slot: int) -> None:
        """Queue a demand load of `key` into `slot`, before all prefetches."""
        self._ask(DEMAND, key, slot)
        self._inner.demand(key, slot)

    def prefetch(self, key: int, slot: int) -> None:
        """Queue a prefetch of `key` into `slot`, behind all demand loads."""
        self._ask(PREFETCH, key, slot)
        self._inner.prefetch(key, slot)

    def defer(self, key: int, slot: int) -> None:
        """Queue a deferred load of `key` into `slot`, behind the others."""
        self._ask(DEFERRED, key, slot)
        self._inner.defer(key, slot)

    def cancel(self, key: int) -> bool:
        """Cancel a request that has not started."""
        is_gone = self._inner.cancel(key)
        if is_gone:
            self._asked.pop(key, None)
            self._trace.emit("cancel", t=self._trace.now(), **self._expert_id(key)._asdict())
        return is_gone

    def completed(self) -> list[Completion]:
        """Return finished requests."""
        return self._seen(self._inner.completed())

    def wait(self) -> list[Completion]:
        """Block until a request finishes, then return all finished ones."""
        return self._seen(self._inner.wait())

    def reset(self) -> None:
        """Cancel what has not started, wait for what has, and drop all completions; nothing is resident then."""
        self._inner.reset()
        now = self._trace.now()
        for key in self._asked:
            self._trace.emit("cancel", t=now, **self._expert_id(key)._asdict())
        for slot, key in self._holds.items():
            if self._slot_of.get(key) == slot:
                self._trace.emit("evict", t=now, **self._expert_id(key)._asdict())
        self._asked.clear()
        self._holds.clear()
        self._slot_of.clear()

    def _ask(self, why: str, key: int, slot: int) -> None:
        now = self._clock()
        before = self._holds.pop(slot, None)
        if before is not None and self._slot_of.get(before) == slot:
            del self._slot_of[before]
            self._trace.emit("evict", t=self._trace.at(now), **self._expert_id(before)._asdict())
        self._asked[key] = (why, slot, now)

    def _seen(self, over: list[Completion]) -> list[Completion]:
        for one in over:
            why, slot, asked_s = self._asked.pop(one.key, (DEMAND, one.slot, one.begun_s))
            at = self._trace.at
            fields = {
                "slot": slot, "why": why, "asked": at(asked_s), "begun": at(one.begun_s), "t": at(one.ended_s),
                "bytes": one.nbytes,
            }  # fmt: skip
            if one.error is not None:
                fields["error"] = str(one.error)
            else:
                self._holds[slot] = one.key
                self._slot_of[one.key] = slot
            self._trace.emit("load", **self._expert_id(one.key)._asdict(), **fields)
        return over
