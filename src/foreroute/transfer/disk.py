"""Experts from files into slots, by O_DIRECT reads in threads.

A packed record is read straight into its slot. Anything else is read, in whole blocks, into the thread's own bounce
buffer and copied from there. One read at a time nearly saturates a disk, and more would make an urgent one share it.
But what was read has to be checked and copied, so there is a finishing thread, which does that while the next expert is
being read. With nothing left to read the reading thread does it itself, and spares the way through another thread.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from queue import Empty, SimpleQueue

from foreroute.checkpoint.source_files import FileStamp
from foreroute.transfer.base import Completion
from foreroute.transfer.files import BlockFiles
from foreroute.transfer.load import Load, Source
from foreroute.transfer.queue import TransferQueue
from foreroute.types import ExpertReads

_LOCK_PATIENCE_S = 2.0


class DiskTransfer:
    """A `Transfer` that reads files.

    Failures travel in the completions and leave the threads alive: ReadError (the disk failed several times in a row,
    a file is too short or is not what it was), ChecksumError (the bytes are not those that were packed).

    Interrupts: Ctrl-C reaches the decode thread only, the readers go on. In `wait` it leaves everything as it was.

    Args:
        reads_of: what fills a slot with this key; called by the reading thread.
        slot_memory: a slot's bytes: writable, 4096-byte aligned, a multiple of 4096 long.
        num_threads: reads at once.
        direct: use O_DIRECT where the files allow it.
        label: a key's name in messages.
        stamps: the files to be read, as they were when their headers were; opened at once and held to that.
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
        assert num_threads > 0, "somebody has to read"
        files = BlockFiles(direct, stamps)
        self._files = files
        self._queue = TransferQueue()
        self._lock = threading.Lock()  # guards _queue, and is never held during I/O
        self._num_in_flight = 0  # the decode thread's own
        self._closed = False
        # One token per request wakes one reader; False ends it. SimpleQueue and a bare lock, not a Condition:
        # Ctrl-C inside a Condition's own Python code can leave its lock taken or released twice.
        self._wake: SimpleQueue[bool] = SimpleQueue()
        self._done: SimpleQueue[Completion] = SimpleQueue()
        # A free one is taken before the request is chosen: no demand waits behind a guess that was chosen too early.
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
        """Reads that failed for a reason that may pass, and were tried again."""
        return self._files.retries

    @property
    def busy_s(self) -> float:
        """Seconds spent in reading alone, summed over threads."""
        return sum(load.busy_s for load in self._loads)

    @property
    def buffered_paths(self) -> list[str]:
        """Files that are read through the page cache: all when `direct` is False, else those that refused O_DIRECT."""
        return self._files.buffered_paths

    @property
    def num_in_flight(self) -> int:
        """Requests whose completion has not been handed out yet."""
        return self._num_in_flight

    def demand(self, key: int, slot: int) -> None:
        """Fill the slot with the key, before every prefetch."""
        self._submit(self._queue.demand, key, slot)

    def prefetch(self, key: int, slot: int) -> None:
        """Fill the slot with the key when no demand is queued."""
        self._submit(self._queue.prefetch, key, slot)

    def fill(self, key: int, slot: int) -> None:
        """Fill the slot with the key when there is time."""
        self._submit(self._queue.fill, key, slot)

    def promote(self, key: int) -> None:
        """A prefetch or fill that has not started becomes a demand."""
        with self._lock:
            self._queue.promote(key)

    def cancel(self, key: int) -> bool:
        """Withdraw a request; False when its read has started."""
        with self._lock:
            cancelled = self._queue.cancel(key)
            self._num_in_flight -= cancelled
        return cancelled

    def completed(self) -> list[Completion]:
        """Hand out what is over."""
        completions: list[Completion] = []
        try:
            while True:
                completions.append(self._done.get_nowait())
        except Empty:
            self._num_in_flight -= len(completions)
        return completions

    def wait(self) -> list[Completion]:
        """Block until something is over, then hand out all that is."""
        assert self._num_in_flight > 0, "nothing is in flight: this would wait for ever"
        first = self._done.get()
        self._num_in_flight -= 1
        return [first, *self.completed()]

    def reset(self) -> None:
        """Withdraw what has not started, wait for what has, and forget all that is over."""
        with self._regained_lock():
            self._queue.clear()
        while self._is_running():
            with contextlib.suppress(Empty):
                self._done.get(timeout=0.01)
        self.completed()
        self._num_in_flight = 0

    def close(self) -> None:
        """Drop what has not started, finish what has, join the threads, close the files."""
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
            # The token first: an interrupt between the two leaves a token too many, never a request that sleeps.
            self._wake.put(True)
            queue(key, slot)
            self._num_in_flight += 1

    @contextlib.contextmanager
    def _regained_lock(self) -> Iterator[None]:
        """The lock, also when an interrupt struck the decode thread between taking it and letting go of it.

        The other threads hold it for microseconds and never during I/O, so what is held for seconds has lost its owner.
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
            if request is None:  # its token outlived it: it was cancelled
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
            # Inside the lock: `reset` relies on it that what does not run any more has been put.
            self._done.put(completion)
