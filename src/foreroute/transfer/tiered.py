"""Copy experts from host memory into device slots, and read those missing in host memory from disk first.

All work is on the decode thread: each call advances the requests that can advance. Few copies run at a time, demands
before prefetches, so that a demand waits for few earlier copies.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch

from foreroute.transfer.base import Completion, Transfer, TransferQueue

# In flight at once: enough that the link does not idle between two calls, few enough that a demand waits little.
MOST_COPIES = 4
MOST_READS = 4


class Copier(Protocol):
    """Copies records of an arena into slots."""

    def start(self, record: int, slot: int) -> Any:
        """Queue a copy of `record` into `slot` behind all compute launched so far; return a ticket. Does not block."""

    def is_done(self, ticket: Any) -> bool:
        """Whether the slot holds the record, for compute launched from now on. Does not block."""

    def wait(self, ticket: Any) -> None:
        """Block until the copy is done."""

    def close(self) -> None:
        """Stop, after all copies have completed."""


class _Copying(NamedTuple):
    key: int
    slot: int
    ticket: Any
    begun_s: float


class TieredTransfer:
    """A `Transfer` from an arena of records.

    Args:
        copier: copies a record into a slot.
        keys: the experts in the first records already, in this order.
        num_records: records in the arena.
        disk: reads missing experts into records; None when the arena holds all.
        nbytes_of: a key's stored bytes.
    """

    def __init__(
        self,
        copier: Copier,
        keys: Sequence[int],
        num_records: int,
        disk: Transfer | None,
        nbytes_of: Callable[[int], int],
    ) -> None:
        self._copier = copier
        self._disk = disk
        self._nbytes_of = nbytes_of
        # Least recently used first. A key being read from disk is not in it yet.
        self._record_of: OrderedDict[int, int] = OrderedDict((key, record) for record, key in enumerate(keys))
        self._free = list(range(num_records - 1, len(keys) - 1, -1))
        self._from_disk = TransferQueue()  # requested, not in memory, not being read
        self._from_memory = TransferQueue()  # requested, in memory, not being copied
        self._slot_of: dict[int, int] = {}  # of all requests in flight
        self._reading: dict[int, int] = {}  # key -> record
        self._copying: deque[_Copying] = deque()
        self._failed: list[Completion] = []
        self._busy_since_s = 0.0
        self.bytes_read = 0
        self.reads = 0
        self.busy_s = 0.0
        self.is_closed = False

    @property
    def retries(self) -> int:
        """Reads from disk that failed transiently, and were retried."""
        return 0 if self._disk is None else self._disk.retries

    @property
    def num_in_flight(self) -> int:
        """Number of requests whose completion has not been returned yet."""
        return len(self._slot_of)

    def demand(self, key: int, slot: int) -> None:
        """Queue a demand load of `key` into `slot`, before all prefetches."""
        self._submit(self._queue_of(key).demand, key, slot)

    def prefetch(self, key: int, slot: int) -> None:
        """Queue a prefetch of `key` into `slot`, behind all demand loads."""
        self._submit(self._queue_of(key).prefetch, key, slot)

    def defer(self, key: int, slot: int) -> None:
        """Queue a deferred load of `key` into `slot`, behind the others."""
        self._submit(self._queue_of(key).defer, key, slot)

    def promote(self, key: int) -> None:
        """Turn a prefetch or deferred load that has not started into a demand."""
        if not self._from_memory.promote(key):
            self._from_disk.promote(key)

    def cancel(self, key: int) -> bool:
        """Cancel a request; False when it is being read or copied."""
        is_gone = self._from_memory.cancel(key) or self._from_disk.cancel(key)
        if is_gone:
            del self._slot_of[key]
        return is_gone

    def completed(self) -> list[Completion]:
        """Return finished requests, and start those that can start."""
        if self._disk is not None and self._disk.num_in_flight:
            self._settle(self._disk.completed())
        over, self._failed = self._failed, []
        while self._copying and self._copier.is_done(self._copying[0].ticket):
            over.append(self._end_copy())
        self._begin()
        for completion in over:
            del self._slot_of[completion.key]
        return over

    def wait(self) -> list[Completion]:
        """Block until a request finishes, then return all finished ones."""
        assert self._slot_of, "nothing is in flight: this would wait for ever"
        while not (over := self.completed()):
            if self._copying:
                self._copier.wait(self._copying[0].ticket)
            else:
                assert self._disk is not None, f"nothing moves, and {self._slot_of} are asked for"
                self._settle(self._disk.wait())
        return over

    def reset(self) -> None:
        """Cancel what has not started, wait for what has, and drop all completions."""
        self._from_memory.clear()
        self._from_disk.clear()
        while self._copying:
            self._copier.wait(self._copying[0].ticket)
            self._end_copy()
        if self._disk is not None:
            self._disk.reset()
        # Interrupted reads may be complete or not: they are read again.
        self._free.extend(self._reading.values())
        self._reading.clear()
        self._failed.clear()
        self._slot_of.clear()

    def close(self) -> None:
        """Cancel what has not started, finish what has, and stop. A second call does nothing."""
        if self.is_closed:
            return
        self.is_closed = True
        self.reset()
        if self._disk is not None:
            self._disk.close()
        self._copier.close()

    def _queue_of(self, key: int) -> TransferQueue:
        if key not in self._record_of:
            return self._from_disk
        self._record_of.move_to_end(key)
        return self._from_memory

    def _submit(self, queue: Callable[[int, int], None], key: int, slot: int) -> None:
        assert not self.is_closed, "the transfer is closed"
        assert key not in self._slot_of, f"key {key} was requested while a request for it is in flight"
        queue(key, slot)
        self._slot_of[key] = slot
        self._begin()

    def _begin(self) -> None:
        while len(self._copying) < MOST_COPIES and (request := self._from_memory.next()) is not None:
            key, slot = request
            self._from_memory.finished(key)
            now_s = perf_counter()
            if not self._copying:
                self._busy_since_s = now_s
            self._copying.append(_Copying(key, slot, self._copier.start(self._record_of[key], slot), now_s))
        while self._disk is not None and len(self._from_disk) and len(self._reading) < MOST_READS:
            record = self._take_record()
            if record < 0:
                return
            request = self._from_disk.next()
            assert request is not None, "the queue is not empty"
            key, _ = request
            self._from_disk.finished(key)
            self._reading[key] = record
            self._disk.demand(key, record)

    def _take_record(self) -> int:
        """Take a free record, or that of the least recently used key not requested now; -1 if there is none."""
        if self._free:
            return self._free.pop()
        for key in self._record_of:
            if key not in self._slot_of:
                return self._record_of.pop(key)
        return -1

    def _settle(self, completions: Sequence[Completion]) -> None:
        """Move finished disk reads to the copy queue as demands: after their wait they go ahead of prefetches."""
        for completion in completions:
            key, record = completion.key, self._reading.pop(completion.key)
            slot = self._slot_of[key]
            if completion.error is not None:
                self._free.append(record)
                self._failed.append(completion._replace(slot=slot))
                continue
            self._record_of[key] = record
            self._from_memory.demand(key, slot)

    def _end_copy(self) -> Completion:
        key, slot, _, begun_s = self._copying.popleft()
        ended_s = perf_counter()
        if not self._copying:
            self.busy_s += ended_s - self._busy_since_s
        nbytes = self._nbytes_of(key)
        self.bytes_read += nbytes
        self.reads += 1
        return Completion(key, slot, None, nbytes, begun_s, ended_s)


class MemoryCopier:
    """Copies into slots in host memory, synchronously.

    Args:
        arena: uint8 [records, record bytes]. slots: uint8 [slots, slot bytes], records as long as slots.
    """

    def __init__(self, arena: torch.Tensor, slots: torch.Tensor) -> None:
        self._arena: torch.Tensor | None = arena
        self._slots: torch.Tensor | None = slots

    def start(self, record: int, slot: int) -> None:
        """Copy `record` into `slot`."""
        assert self._arena is not None, "the copier is closed"
        assert self._slots is not None, "the copier is closed"
        self._slots[slot].copy_(self._arena[record])

    def is_done(self, ticket: None) -> bool:
        """True, as `start` copies synchronously."""
        return True

    def wait(self, ticket: None) -> None:
        """Do nothing, as `start` copies synchronously."""

    def close(self) -> None:
        """Drop the references to the memory."""
        self._arena = self._slots = None


class CudaCopier:
    """Copies into slots on a GPU: cudaMemcpyAsync from pinned memory on a side stream, with an event after each copy.

    Kernels queued in the compute stream may still read an evicted slot: a copy starts after all that is queued there
    when it is requested.

    Args:
        arena: uint8 [records, record bytes], pinned. slots: uint8 [slots, slot bytes] on the device.
    """

    def __init__(self, arena: torch.Tensor, slots: torch.Tensor) -> None:
        self._arena: torch.Tensor | None = arena
        self._slots: torch.Tensor | None = slots
        self._device = slots.device
        self._stream = torch.cuda.Stream(slots.device)

    def start(self, record: int, slot: int) -> torch.cuda.Event:
        """Queue a copy of `record` into `slot`; return the event behind it."""
        assert self._arena is not None, "the copier is closed"
        assert self._slots is not None, "the copier is closed"
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._slots[slot].copy_(self._arena[record], non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def is_done(self, ticket: torch.cuda.Event) -> bool:
        """Whether the copy is complete, for kernels launched from now on."""
        return bool(ticket.query())

    def wait(self, ticket: torch.cuda.Event) -> None:
        """Block until the copy is complete."""
        ticket.synchronize()

    def close(self) -> None:
        """Wait for the stream, and drop the references to the memory."""
        self._stream.synchronize()
        self._arena = self._slots = None
