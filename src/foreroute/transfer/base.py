"""Protocol of a transfer, which reads experts into slots in the background, and of its completions."""

from typing import NamedTuple, Protocol


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


class TransferProxy:
    """A `Transfer` that forwards every call to another one: base class of those that change or record some calls."""

    def __init__(self, inner: Transfer) -> None:
        self._inner = inner

    @property
    def bytes_read(self) -> int:
        """See `Transfer`."""
        return self._inner.bytes_read

    @property
    def reads(self) -> int:
        """See `Transfer`."""
        return self._inner.reads

    @property
    def busy_s(self) -> float:
        """See `Transfer`."""
        return self._inner.busy_s

    @property
    def retries(self) -> int:
        """See `Transfer`."""
        return self._inner.retries

    @property
    def num_in_flight(self) -> int:
        """See `Transfer`."""
        return self._inner.num_in_flight

    def demand(self, key: int, slot: int) -> None:
        """See `Transfer`."""
        self._inner.demand(key, slot)

    def prefetch(self, key: int, slot: int) -> None:
        """See `Transfer`."""
        self._inner.prefetch(key, slot)

    def defer(self, key: int, slot: int) -> None:
        """See `Transfer`."""
        self._inner.defer(key, slot)

    def promote(self, key: int) -> None:
        """See `Transfer`."""
        self._inner.promote(key)

    def cancel(self, key: int) -> bool:
        """See `Transfer`."""
        return self._inner.cancel(key)

    def completed(self) -> list[Completion]:
        """See `Transfer`."""
        return self._inner.completed()

    def wait(self) -> list[Completion]:
        """See `Transfer`."""
        return self._inner.wait()

    def reset(self) -> None:
        """See `Transfer`."""
        self._inner.reset()

    def close(self) -> None:
        """See `Transfer`."""
        self._inner.close()
