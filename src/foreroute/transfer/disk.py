"""Experts from files into slots: O_DIRECT reads by one or two threads.

A packed record is read straight into its slot. Anything else is read, in whole blocks, into the thread's own bounce
buffer and copied from there. One thread nearly saturates a disk, so more only make an urgent read share the disk with
others; two help where much is copied.
"""

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from time import perf_counter

import numpy as np
import xxhash

from foreroute.errors import ChecksumError, ReadError
from foreroute.transfer.base import Completion
from foreroute.transfer.copies import apply_copies
from foreroute.transfer.files import BLOCK_BYTES, BlockFiles, round_down, round_up
from foreroute.transfer.memory import map_memory
from foreroute.transfer.queue import TransferQueue
from foreroute.types import ExpertReads, Read


class DiskTransfer:
    """A `Transfer` that reads files.

    Failures travel in the completions and leave the threads alive: ReadError (the disk, or a file that is too short),
    ChecksumError (the bytes are not those that were packed).

    Interrupts: Ctrl-C reaches the decode thread only, the readers go on. In `wait` it leaves everything as it was.

    Args:
        reads_of: what fills a slot with this key; called by the reading thread.
        slot_memory: a slot's bytes: writable, 4096-byte aligned, a multiple of 4096 long.
        num_threads: readers.
        direct: use O_DIRECT where the files allow it.
        label: a key's name in messages.
    """

    def __init__(
        self,
        reads_of: Callable[[int], ExpertReads],
        slot_memory: Callable[[int], memoryview],
        *,
        num_threads: int = 1,
        direct: bool = True,
        label: Callable[[int], str] = "expert key {}".format,
    ) -> None:
        assert num_threads > 0, "somebody has to read"
        files = BlockFiles(direct)
        self._files = files
        self._queue = TransferQueue()
        self._lock = threading.Lock()  # guards _queue, and is never held during I/O
        self._num_in_flight = 0  # the decode thread's own
        self._closed = False
        # One token per request wakes one reader; False ends it. SimpleQueue and a bare lock, not a Condition:
        # Ctrl-C inside a Condition's own Python code can leave its lock taken or released twice.
        self._wake: SimpleQueue[bool] = SimpleQueue()
        self._done: SimpleQueue[Completion] = SimpleQueue()
        self._readers = [_Reader(files, reads_of, slot_memory, label) for _ in range(num_threads)]
        self._threads = [
            threading.Thread(target=self._serve, args=(reader,), name=f"foreroute-read-{index}", daemon=True)
            for index, reader in enumerate(self._readers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, padding to the block size included."""
        return sum(reader.bytes_read for reader in self._readers)

    @property
    def reads(self) -> int:
        """Contiguous ranges read so far."""
        return sum(reader.reads for reader in self._readers)

    @property
    def busy_s(self) -> float:
        """Seconds spent in reading alone, summed over threads."""
        return sum(reader.busy_s for reader in self._readers)

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

    def promote(self, key: int) -> None:
        """A prefetch that has not started becomes a demand."""
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

    def close(self) -> None:
        """Drop what has not started, finish what has, join the threads, close the files."""
        if self._closed:
            return
        with self._lock:
            self._closed = True
            self._num_in_flight -= self._queue.clear()
        for _ in self._threads:
            self._wake.put(False)
        for thread in self._threads:
            thread.join()
        self._files.close()

    def _submit(self, queue: Callable[[int, int], None], key: int, slot: int) -> None:
        assert not self._closed, "the transfer is closed"
        with self._lock:
            # The token first: an interrupt between the two leaves a token too many, never a request that sleeps.
            self._wake.put(True)
            queue(key, slot)
            self._num_in_flight += 1

    def _serve(self, reader: "_Reader") -> None:
        while self._wake.get():
            with self._lock:
                request = self._queue.next()
            if request is None:  # its token outlived it: it was cancelled
                continue
            key, slot = request
            completion = reader.fill(key, slot)
            with self._lock:
                self._queue.finished(key)
            self._done.put(completion)


class _Reader:
    """What one thread owns: its bounce buffer and its counters."""

    def __init__(
        self,
        files: BlockFiles,
        reads_of: Callable[[int], ExpertReads],
        slot_memory: Callable[[int], memoryview],
        label: Callable[[int], str],
    ) -> None:
        self.bytes_read = 0
        self.reads = 0
        self.busy_s = 0.0
        self._files = files
        self._reads_of = reads_of
        self._slot_memory = slot_memory
        self._label = label
        self._bounce = memoryview(bytearray())

    def fill(self, key: int, slot: int) -> Completion:
        """Bring one expert into its slot, or say why not."""
        try:
            reads = self._reads_of(key)
            memory = self._slot_memory(slot)
            for read in reads:
                self._fill_part(key, read, memory, alone=len(reads) == 1)
        except Exception as error:  # noqa: BLE001  whatever it is, the decode thread raises it; this thread lives on
            return Completion(key, slot, error, 0)
        return Completion(key, slot, None, sum(read.nbytes for read in reads))

    def _fill_part(self, key: int, read: Read, memory: memoryview, *, alone: bool) -> None:
        # The last block's padding lands in the slot too: only where no other part can lie there.
        if alone and read.is_direct and read.copies[0].src_offset == 0 and read.offset % BLOCK_BYTES == 0:
            block = memory[: round_up(read.nbytes)]
            self._read(key, read, block, read.offset)
            self._check(key, read, block[: read.nbytes])
            return
        start = round_down(read.offset)
        block = self._bounce_of(round_up(read.offset + read.nbytes) - start)
        self._read(key, read, block, start)
        part = block[read.offset - start : read.offset - start + read.nbytes]
        self._check(key, read, part)
        apply_copies(read.copies, np.frombuffer(part, dtype=np.uint8), memory)

    def _read(self, key: int, read: Read, block: memoryview, offset: int) -> None:
        began_s = perf_counter()
        try:
            self.bytes_read += self._files.read(read.path, offset, block, read.offset + read.nbytes - offset)
        except ReadError as error:
            raise ReadError(f"{self._where(key, read)}: {error}. Get the file again, or pack it again.") from None
        except OSError as error:
            raise ReadError(
                f"{self._where(key, read)}: {error.strerror}. Check the disk and that the file is still there."
            ) from error
        finally:
            self.busy_s += perf_counter() - began_s
        self.reads += 1

    def _check(self, key: int, read: Read, part: memoryview) -> None:
        if read.checksum is not None and xxhash.xxh3_64_intdigest(part) != read.checksum:
            raise ChecksumError(
                f"{self._where(key, read)}: the {read.nbytes} bytes there are not those that were packed. "
                "Pack the model again (foreroute pack); if that happens twice, check the disk."
            )

    def _where(self, key: int, read: Read) -> str:
        return f"Reading {self._label(key)} from {read.path} at offset {read.offset}"

    def _bounce_of(self, num_bytes: int) -> memoryview:
        if len(self._bounce) < num_bytes:
            self._bounce = memoryview(map_memory(num_bytes))
        return self._bounce[:num_bytes]
