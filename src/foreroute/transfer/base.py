"""What a transfer is, which reads experts into slots in the background, and which request it serves next.

Decisions only: no thread, no lock, no file.
"""

from collections import OrderedDict
from typing import NamedTuple, Protocol

# Prefetches in a row that may overtake a deferred load.
_MOST_PASSED = 3


class Completion(NamedTuple):
    """One completed or failed request.

    key, slot: the expert and its slot.
    error: why the slot does not hold the expert, None when it does.
    nbytes: the expert's stored bytes, 0 after an error.
    begun_s, ended_s: start and end of the read, by time.perf_counter; 0 when not measured.
    """

    key: int
    slot: int
    error: Exception | None
    nbytes: int
    begun_s: float = 0.0
    ended_s: float = 0.0


class Transfer(Protocol):
    """Reads experts into slots in the background. All methods are called by one thread, the decode thread.

    A request is *in flight* from `demand`, `prefetch` or `defer` until its completion has been returned, or until a
    `cancel` that returned True. A key may be requested again only after that.

    Attributes:
        bytes_read: bytes read so far, padding to the block size included.
        reads: contiguous ranges read so far.
        busy_s: seconds spent in reading alone, summed over threads.
        retries: reads that failed transiently, and were retried.
    """

    @property
    def bytes_read(self) -> int: ...

    @property
    def reads(self) -> int: ...

    @property
    def busy_s(self) -> float: ...

    @property
    def retries(self) -> int: ...

    @property
    def num_in_flight(self) -> int:
        """Number of requests whose completion has not been returned yet."""

    def demand(self, key: int, slot: int) -> None:
        """Queue a demand load of `key` into `slot`, before all prefetches. Does not block."""

    def prefetch(self, key: int, slot: int) -> None:
        """Queue a prefetch of `key` into `slot`, behind all demand loads. Does not block."""

    def defer(self, key: int, slot: int) -> None:
        """Queue a deferred load of `key` into `slot`, behind the others. Does not block."""

    def promote(self, key: int) -> None:
        """Turn a prefetch or deferred load that has not started into the last demand; ignores other keys."""

    def cancel(self, key: int) -> bool:
        """Cancel a request. True if it had not started and is removed; False if it goes on to complete."""

    def completed(self) -> list[Completion]:
        """Return finished requests, in order of completion. Does not block."""

    def wait(self) -> list[Completion]:
        """Block until a request finishes, then return all finished ones. Something has to be in flight."""

    def reset(self) -> None:
        """Cancel what has not started, wait for what has, drop all completions. Safe after an interrupted call."""

    def close(self) -> None:
        """Cancel what has not started, finish what has, and stop. A second call does nothing."""


class TransferQueue:
    """Serve demands first, in order of arrival; then prefetches, then deferred loads, likewise.

    So that prefetches do not starve deferred loads, every fourth request that is no demand is a deferred load, if there
    is one. A request is queued, then running, then finished and forgotten.
    """

    def __init__(self) -> None:
        self._demands: OrderedDict[int, int] = OrderedDict()
        self._prefetches: OrderedDict[int, int] = OrderedDict()
        self._deferred: OrderedDict[int, int] = OrderedDict()
        self._num_passed = 0
        self._running: set[int] = set()

    def __len__(self) -> int:
        """Number of requests that have not started."""
        return len(self._demands) + len(self._prefetches) + len(self._deferred)

    @property
    def num_running(self) -> int:
        """Number of requests that have started and not finished."""
        return len(self._running)

    def demand(self, key: int, slot: int) -> None:
        """Queue a load of `key` into `slot` behind the other demands."""
        self._refuse_known(key)
        self._demands[key] = slot

    def prefetch(self, key: int, slot: int) -> None:
        """Queue a load of `key` into `slot` behind the other prefetches."""
        self._refuse_known(key)
        self._prefetches[key] = slot

    def defer(self, key: int, slot: int) -> None:
        """Queue a load of `key` into `slot` behind the other deferred loads."""
        self._refuse_known(key)
        self._deferred[key] = slot

    def promote(self, key: int) -> bool:
        """Move a queued prefetch or deferred load behind the demands. False for any other key."""
        slot = self._prefetches.pop(key, None)
        if slot is None:
            slot = self._deferred.pop(key, None)
        if slot is None:
            return False
        self._demands[key] = slot
        return True

    def cancel(self, key: int) -> bool:
        """Remove a queued request. False when it is running or unknown."""
        return any(queue.pop(key, None) is not None for queue in (self._demands, self._prefetches, self._deferred))

    def next(self) -> tuple[int, int] | None:
        """Start the next request; return its (key, slot), None when nothing is queued."""
        queue = self._demands or self._next_unawaited()
        if not queue:
            return None
        key, slot = queue.popitem(last=False)
        self._running.add(key)
        return key, slot

    def finished(self, key: int) -> None:
        """Mark a running request as finished; its key may be queued again."""
        self._running.remove(key)

    def clear(self) -> int:
        """Drop all requests that have not started; return their number."""
        dropped = len(self)
        self._demands.clear()
        self._prefetches.clear()
        self._deferred.clear()
        return dropped

    def _next_unawaited(self) -> OrderedDict[int, int]:
        if not self._deferred or (self._prefetches and self._num_passed < _MOST_PASSED):
            self._num_passed += bool(self._deferred)
            return self._prefetches
        self._num_passed = 0
        return self._deferred

    def _refuse_known(self, key: int) -> None:
        known = key in self._demands or key in self._prefetches or key in self._deferred or key in self._running
        assert not known, f"key {key} was requested while a request for it is in flight"
