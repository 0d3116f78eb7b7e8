"""Read experts from files into slots, by O_DIRECT reads in threads.

A packed record is read straight into its slot. Anything else is read, in whole blocks, into the thread's bounce buffer
and copied from there. One read at a time nearly saturates a disk, and more would slow down an urgent one. But each read
has to be checked and copied: a finishing thread does so while the next expert is being read. With nothing left to read,
the reading thread does it itself, to save the handover.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from queue import Empty, SimpleQueue
from typing import Any

from foreroute.checkpoint.source_files import FileStamp
from foreroute.transfer.base import Completion, TransferQueue
from foreroute.transfer.files import BlockFiles
from foreroute.transfer.load import Load, Source
from foreroute.transfer.memory import allocate_slots
from foreroute.types import ExpertReads

_LOCK_PATIENCE_S = 2.0


class DiskTransfer:
    """A `Transfer` that reads files.

    Failures are reported in the completions, and the threads go on: ReadError (the disk failed several times in a row,
    a file is too short or has changed), ChecksumError (the bytes are not those that were packed).

    Interrupts: Ctrl-C reaches the decode thread only; the readers go on. In `wait` it changes no state.

    Args:
        reads_of: a key -> the reads that load it; called by the reading thread.
        slot_memory: a slot's bytes: writable, 4096-byte aligned, a multiple of 4096 long.
        num_threads: concurrent reads.
        direct: use O_DIRECT where the files allow it.
        label: a key's name in messages.
        stamps: the files to be read, with their state when their headers were read; opened at once, checked against it.
    Raises:
        ReadError: one of those files cannot be opened, or has changed.
    """

    def __init__(
        self,
        reads_of: Callable[[int], ExpertReads],
        slot_memory: Callable[[int], memoryview],
        *,
        num_threads: int = 1,
        direct: bool = True,
        label: Callable[[int], str] = "expert key {}".format,
        stamps: Mapping[str, FileStamp] | None = None,
    ) -> None:
        assert num_threads > 0, "at least one reader"
        files = BlockFiles(direct, stamps)
        self._files = files
        self._queue = TransferQueue()
        self._lock = threading.Lock()  # guards _queue, and is never held during I/O
        self._num_in_flight = 0  # used by the decode thread alone
        self._closed = False
        # One token per request wakes one reader; False ends it. SimpleQueue and a bare lock, not a Condition:
        # Ctrl-C inside a Condition's own Python code can leave its lock taken or released twice.
        self._wake: SimpleQueue[bool] = SimpleQueue()
        self._done: SimpleQueue[Completion] = SimpleQueue()
        # A free Load is taken before the request is chosen: no demand waits behind a prefetch chosen too early.
        source = Source(files, reads_of, slot_memory, label)
        self._loads = [Load(source) for _ in range(num_threads + 1)]
        self._free: SimpleQueue[Load] = SimpleQueue()
        for load in self._loads:
            self._free.put(load)
        self._unfinished: SimpleQueue[Load | None] = SimpleQueue()  # None ends the finishing thread
        self._readers = [self._thread(self._read, f"foreroute-read-{index}") for index in range(num_threads)]
        self._finisher = self._thread(self._finish, "foreroute-finish")

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, padding to the block size included."""
        return sum(load.bytes_read for load in self._loads)

    @property
    def reads(self) -> int:
        """Contiguous ranges read so far."""
        return sum(load.reads for load in self._loads)

    @property
    def retries(self) -> int:
        """Reads that failed transiently, and were retried."""
        return self._files.retries

    @property
    def busy_s(self) -> float:
        """Seconds spent in reading alone, summed over threads."""
        return sum(load.busy_s for load in self._loads)

    @property
    def buffered_paths(self) -> list[str]:
        """Files read through the page cache: all when `direct` is False, else those that refused O_DIRECT."""
        return self._files.buffered_paths

    @property
    def num_in_flight(self) -> int:
        """Number of requests whose completion has not been returned yet."""
        return self._num_in_flight

    def demand(self, key: int, slot: int) -> None:
        """Queue a demand load of `key` into `slot`, before all prefetches."""
        self._submit(self._queue.demand, key, slot)

    def prefetch(self, key: int, slot: int) -> None:
        """Queue a prefetch of `key` into `slot`, behind all demand loads."""
        self._submit(self._queue.prefetch, key, slot)

    def defer(self, key: int, slot: int) -> None:
        """Queue a deferred load of `key` into `slot`, behind the others."""
        self._submit(self._queue.defer, key, slot)

    def promote(self, key: int) -> None:
        """Turn a prefetch or deferred load that has not started into a demand."""
        with self._lock:
            self._queue.promote(key)

    def cancel(self, key: int) -> bool:
        """Cancel a request; False when its read has started."""
        with self._lock:
            cancelled = self._queue.cancel(key)
            self._num_in_flight -= cancelled
        return cancelled

    def completed(self) -> list[Completion]:
        """Return finished requests."""
        completions: list[Completion] = []
        try:
            while True:
                completions.append(self._done.get_nowait())
        except Empty:
            self._num_in_flight -= len(completions)
        return completions

    def wait(self) -> list[Completion]:
        """Block until a request finishes, then return all finished ones."""
        assert self._num_in_flight > 0, "nothing is in flight: this would wait for ever"
        first = self._done.get()
        self._num_in_flight -= 1
        return [first, *self.completed()]

    def reset(self) -> None:
        """Cancel what has not started, wait for what has, and drop all completions."""
        with self._regained_lock():
            self._queue.clear()
        while self._is_running():
            with contextlib.suppress(Empty):
                self._done.get(timeout=0.01)
        self.completed()
        self._num_in_flight = 0

    def close(self) -> None:
        """Cancel what has not started, finish what has, join the threads, close the files."""
        if self._closed:
            return
        with self._regained_lock():
            self._closed = True
            self._num_in_flight -= self._queue.clear()
        for _ in self._readers:
            self._wake.put(False)
        for thread in self._readers:
            while thread.is_alive():
                thread.join(_LOCK_PATIENCE_S)
                with self._regained_lock():
                    pass
        self._unfinished.put(None)
        self._finisher.join()
        self._files.close()

    def _submit(self, queue: Callable[[int, int], None], key: int, slot: int) -> None:
        assert not self._closed, "the transfer is closed"
        with self._lock:
            # The token first: an interrupt between the two leaves a spare token, never a request that no reader sees.
            self._wake.put(True)
            queue(key, slot)
            self._num_in_flight += 1

    @contextlib.contextmanager
    def _regained_lock(self) -> Iterator[None]:
        """Acquire the lock, even if an interrupt hit the decode thread between acquiring and releasing it.

        Other threads hold it for microseconds and never during I/O, so a lock held for seconds has lost its owner.
        """
        self._lock.acquire(timeout=_LOCK_PATIENCE_S)
        try:
            yield
        finally:
            self._lock.release()

    def _is_running(self) -> bool:
        with self._regained_lock():
            return self._queue.num_running > 0

    def _thread(self, work: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        return thread

    def _read(self) -> None:
        load = self._free.get()
        while self._wake.get():
            with self._lock:
                request = self._queue.next()
                others_wait = len(self._queue) > 0
            if request is None:  # it was cancelled after its token was put
                continue
            load.read(*request)
            if others_wait and load.needs_finishing:
                self._unfinished.put(load)
                load = self._free.get()
            else:
                self._complete(load)
        self._free.put(load)

    def _finish(self) -> None:
        while (load := self._unfinished.get()) is not None:
            self._complete(load)
            self._free.put(load)

    def _complete(self, load: Load) -> None:
        completion = load.finish()
        with self._lock:
            self._queue.finished(completion.key)
            # Inside the lock: `reset` relies on every request that no longer runs having been put.
            self._done.put(completion)


@contextlib.contextmanager
def own_reader(
    reads_of: Callable[[int], ExpertReads], num_slots: int, slot_bytes: int, **options: Any
) -> Iterator[tuple[DiskTransfer, list[memoryview]]]:
    """Inside, readers with slots of their own, beside any pool; afterwards both are freed.

    Args:
        num_slots, slot_bytes: how many slots, and the length of one. reads_of, options: of the `DiskTransfer`.
    """
    memory, slots = allocate_slots(num_slots, slot_bytes)
    transfer = DiskTransfer(reads_of, slots.__getitem__, **options)
    try:
        yield transfer, slots
    finally:
        transfer.close()
        slots.clear()
        del memory
