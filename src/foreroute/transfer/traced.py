"""A transfer that traces its loads (when and why), cancellations and evictions."""

from collections.abc import Callable

from foreroute.trace import Trace
from foreroute.transfer.base import Completion, Transfer, TransferProxy
from foreroute.types import ExpertId

DEMAND, PREFETCH, DEFERRED = "demand", "prefetch", "deferred"


class TracedTransfer(TransferProxy):
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
