"""What every mover of experts offers to the engine, and how it reports."""

from typing import NamedTuple, Protocol


class Completion(NamedTuple):
    """One request that is over.

    key, slot: the expert and where it went.
    error: why the slot does not hold the expert, None when it does.
    nbytes: the expert's stored bytes, 0 after an error.
    begun_s, ended_s: when it was read, by time.perf_counter; 0 where nobody looked.
    """

    key: int
    slot: int
    error: Exception | None
    nbytes: int
    begun_s: float = 0.0
    ended_s: float = 0.0


class Transfer(Protocol):
    """Fills slots with experts, in the background. All methods are called by one thread, the decode thread.

    A request is *in flight* from `demand`, `prefetch` or `fill` until its completion has been handed out, or until a
    `cancel` that returned True. A key is requested again only after that.

    Attributes:
        bytes_read: bytes read so far, padding to the block size included.
        reads: contiguous ranges read so far.
        busy_s: seconds spent in reading alone, summed over threads.
        retries: reads that failed for a reason that may pass, and were tried again.
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
        """Requests whose completion has not been handed out yet."""

    def demand(self, key: int, slot: int) -> None:
        """Fill the slot with the key; somebody waits for it. Served before every prefetch. Does not block."""

    def prefetch(self, key: int, slot: int) -> None:
        """Fill the slot with the key when no demand is queued. Does not block."""

    def fill(self, key: int, slot: int) -> None:
        """Fill the slot with the key when there is time: nobody needs it now. Does not block."""

    def promote(self, key: int) -> None:
        """A prefetch or fill that has not started becomes the last of the demands; nothing happens to other keys."""

    def cancel(self, key: int) -> bool:
        """Withdraw a request. True when it had not started and is gone; else it goes on and completes."""

    def completed(self) -> list[Completion]:
        """Hand out what is over, in the order of completion. Does not block."""

    def wait(self) -> list[Completion]:
        """Block until something is over, then hand out all that is. Something has to be in flight."""

    def reset(self) -> None:
        """Withdraw what has not started, wait for what has, and forget all that is over: nothing is in flight then.

        Right also when an interrupt has left a call half done.
        """

    def close(self) -> None:
        """Drop what has not started, finish what has, stop. A second call does nothing."""


class TransferProxy:
    """A `Transfer` that hands every call on to another one: the base of those that change or watch some of them."""

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

    def fill(self, key: int, slot: int) -> None:
        """See `Transfer`."""
        self._inner.fill(key, slot)

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
