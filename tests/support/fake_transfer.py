"""A transfer whose copies finish when the test says so."""

from collections.abc import Callable

from foreroute.transfer.base import Completion, TransferQueue


class FakeTransfer:
    """A `Transfer` without threads or files.

    Args:
        fill: puts a key's bytes into a slot when its copy finishes; returns how many those are.
        finish_on_wait: `wait` finishes the next request itself, demands first, instead of failing the test.

    Attributes:
        calls: what was asked for, in order: ("demand", key, slot), ("prefetch", key, slot), ("defer", key, slot),
            ("promote", key),
            ("cancel", key), ("reset",).
        closed: True after `close`.
    """

    def __init__(self, fill: Callable[[int, int], int] | None = None, *, finish_on_wait: bool = False) -> None:
        self.calls: list[tuple[str | int, ...]] = []
        self.closed = False
        self.bytes_read = 0
        self.reads = 0
        self.busy_s = 0.0
        self.retries = 0
        self._fill = fill
        self._finish_on_wait = finish_on_wait
        self._queue = TransferQueue()
        self._slots: dict[int, int] = {}
        self._running: list[int] = []
        self._done: list[Completion] = []

    @property
    def num_in_flight(self) -> int:
        """Requests whose completion has not been handed out yet."""
        return len(self._slots) + len(self._done)

    def demand(self, key: int, slot: int) -> None:
        """Record and queue it."""
        assert not self.closed, "the transfer is closed"
        self.calls.append(("demand", key, slot))
        self._queue.demand(key, slot)
        self._slots[key] = slot

    def prefetch(self, key: int, slot: int) -> None:
        """Record and queue it."""
        assert not self.closed, "the transfer is closed"
        self.calls.append(("prefetch", key, slot))
        self._queue.prefetch(key, slot)
        self._slots[key] = slot

    def defer(self, key: int, slot: int) -> None:
        """Record and queue it."""
        assert not self.closed, "the transfer is closed"
        self.calls.append(("defer", key, slot))
        self._queue.defer(key, slot)
        self._slots[key] = slot

    def promote(self, key: int) -> None:
        """Record it; a queued prefetch becomes a demand."""
        self.calls.append(("promote", key))
        self._queue.promote(key)

    def cancel(self, key: int) -> bool:
        """Record it; True unless the test began the copy."""
        self.calls.append(("cancel", key))
        cancelled = self._queue.cancel(key)
        if cancelled:
            del self._slots[key]
        return cancelled

    def completed(self) -> list[Completion]:
        """Hand out what the test finished."""
        done, self._done = self._done, []
        return done

    def wait(self) -> list[Completion]:
        """Hand out what the test finished; with nothing finished this would block, which fails the test."""
        assert self.num_in_flight, "nothing is in flight: this would wait for ever"
        if not self._done and self._finish_on_wait:
            self.finish(self._running[0] if self._running else self.begin())
        assert self._done, f"the test has finished none of {sorted(self._slots)}"
        return self.completed()

    def reset(self) -> None:
        """Forget everything; copies that were begun count as finished."""
        self.calls.append(("reset",))
        for key in self._running:
            self._queue.finished(key)
        self._queue.clear()
        self._slots.clear()
        self._running.clear()
        self._done.clear()

    def close(self) -> None:
        """Drop all requests that were not begun."""
        self.closed = True
        while (request := self._queue.next()) is not None:
            del self._slots[request[0]]

    # The test's side.

    @property
    def in_flight(self) -> list[int]:
        """Keys that were asked for and neither finished nor cancelled, in the order of asking."""
        return list(self._slots)

    def begin(self) -> int:
        """Start the next copy, demands first; its key. It can no longer be cancelled."""
        request = self._queue.next()
        assert request is not None, "nothing is queued"
        self._running.append(request[0])
        return request[0]

    def finish(self, key: int) -> None:
        """The key's bytes are in its slot."""
        nbytes = self._fill(key, self._slots[key]) if self._fill else 0
        self.bytes_read += nbytes
        self.reads += 1
        self._end(key, None, nbytes)

    def fail(self, key: int, error: Exception) -> None:
        """The key's copy failed."""
        self._end(key, error, 0)

    def _end(self, key: int, error: Exception | None, nbytes: int) -> None:
        slot = self._slots.pop(key)
        if key in self._running:
            self._running.remove(key)
            self._queue.finished(key)
        else:
            self._queue.cancel(key)
        self._done.append(Completion(key, slot, error, nbytes))
