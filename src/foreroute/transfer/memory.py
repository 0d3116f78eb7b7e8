"""Memory that experts are read into: the pool's slots, an arena behind a GPU, and what a GPU has free.

Page-aligned, as direct reads need it. An arena is records side by side in one mapping, pinned by registering it, not by
a pinned allocation, which rounds up to a power of two. A record is as long as a slot, so that the disk reads straight
into it and moving it to a slot is one copy.
"""

import contextlib
import mmap
from collections.abc import Iterable, Iterator, Sequence

import torch

from foreroute.errors import DeviceError
from foreroute.system.memory import advise_huge, map_private
from foreroute.transfer.base import Transfer
from foreroute.transfer.huge_pages import HUGE_PAGE_BYTES
from foreroute.types import BLOCK_BYTES, Progress, SlotClass, round_up
from foreroute.units import format_memory

# cudaHostRegisterPortable | cudaHostRegisterMapped: valid in every context, and readable by kernels.
_REGISTER_FLAGS = 0x1 | 0x2
# Reads queued at once while the arena is loaded: enough that no reader waits for this thread.
_READS_AHEAD = 64


def map_memory(num_bytes: int) -> mmap.mmap:
    """Map at least `num_bytes` of anonymous memory: 4096-byte aligned, zero, committed as it is touched.

    On huge pages where available: O_DIRECT pins every page that it writes to, which on small ones halves the rate of a
    fast disk (1.1 against 2.3 GB/s, benchmarks/disk.py). The system gives them to private mappings only (Python's
    default is shared), and throughout only to one whose length is a whole number of them.
    """
    if num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return map_private(num_bytes)
    num_bytes = round_up(num_bytes, HUGE_PAGE_BYTES)
    memory = map_private(num_bytes)
    advise_huge(memory)
    return memory


def allocate_slots(num_slots: int, slot_bytes: int) -> tuple[mmap.mmap, list[memoryview]]:
    """Allocate a pool's memory; return it and a view of each slot.

    Args:
        num_slots: slots in the pool.
        slot_bytes: length of one, a multiple of 4096 for direct reads.
    """
    return allocate_pool([SlotClass(slot_bytes, num_slots, (), 0)])


def allocate_pool(classes: Sequence[SlotClass]) -> tuple[mmap.mmap, list[memoryview]]:
    """Allocate a pool's memory for slots of several lengths; return it and a view of each slot, by its number."""
    for one in classes:
        assert one.slot_bytes > 0, "a slot has a length"
        assert one.slot_bytes % BLOCK_BYTES == 0, f"{one.slot_bytes} is not a multiple of {BLOCK_BYTES}"
    memory = map_memory(sum(one.nbytes for one in classes))
    whole = memoryview(memory)
    slots = []
    for one in classes:
        starts = (one.offset(slot) for slot in range(one.first, one.first + one.num_slots))
        slots += [whole[start : start + one.slot_bytes] for start in starts]
    return memory, slots


class Arena:
    """Allocate `num_records` records of `record_bytes` each, zero until they are loaded.

    Args:
        record_bytes: a multiple of 4096.
        is_pinned: register the memory with CUDA.

    Attributes:
        records: each record's bytes, writable, 4096-byte aligned.
        tensor: all of them, uint8 [num_records, record_bytes]; the same memory.

    Raises:
        DeviceError: the memory cannot be allocated or pinned.
    """

    def __init__(self, num_records: int, record_bytes: int, *, is_pinned: bool = False) -> None:
        self.num_records = num_records
        self.record_bytes = record_bytes
        self.nbytes = num_records * record_bytes
        try:
            memory, records = allocate_slots(num_records, record_bytes)
        except (OSError, OverflowError) as error:
            raise DeviceError(_too_large(self.nbytes, "had", str(error))) from error
        self._memory: mmap.mmap | None = memory
        self.records = records
        flat = torch.frombuffer(memory, dtype=torch.uint8, count=self.nbytes)
        self.tensor: torch.Tensor = flat.view(num_records, record_bytes)
        self.is_pinned = False
        if is_pinned:
            self._pin()

    @property
    def address(self) -> int:
        """Address of the first record; for pinned memory, a kernel's too."""
        return self.tensor.data_ptr()

    def close(self) -> None:
        """Free the memory. Nothing may be reading it. A second call does nothing."""
        if self._memory is None:
            return
        if self.is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self.address)
            self.is_pinned = False
        self.tensor = torch.empty(0, 0, dtype=torch.uint8)
        self.records.clear()
        self._memory = None

    def _pin(self) -> None:
        code = int(torch.cuda.cudart().cudaHostRegister(self.address, self.nbytes, _REGISTER_FLAGS))
        if code != 0:
            self.tensor = torch.empty(0, 0, dtype=torch.uint8)
            self.records.clear()
            raise DeviceError(_too_large(self.nbytes, "pinned", f"cudaHostRegister: error {code}"))
        self.is_pinned = True


def _too_large(nbytes: int, verb: str, why: str) -> str:
    return (
        f"{format_memory(nbytes)} of host memory for experts cannot be {verb} ({why}). Lower --host-memory: what is "
        "beyond it stays on disk. In a container, raise its limits of memory and of locked memory "
        "(ulimit -l; docker run --ulimit memlock=-1)."
    )


def load_records(disk: Transfer, keys: Iterable[int], progress: Progress = lambda done, total: None) -> None:
    """Read the experts `keys` in parallel, each into the record of its index in `keys`.

    Args:
        disk: reads into records; its errors are raised here, after running reads end. progress: (done, of all).
    Raises:
        ReadError, ChecksumError: an expert could not be read.
    """
    waiting = list(enumerate(keys))[::-1]
    total, done = len(waiting), 0
    try:
        while waiting or disk.num_in_flight:
            while waiting and disk.num_in_flight < _READS_AHEAD:
                record, key = waiting.pop()
                disk.defer(key, record)
            for completion in disk.wait():
                if completion.error is not None:
                    raise completion.error
                done += 1
            progress(done, total)
    finally:
        disk.reset()


def memory_of(device: torch.device) -> tuple[int, int]:
    """Return the GPU's free and total bytes."""
    free, total = torch.cuda.mem_get_info(device)
    return int(free), int(total)


@contextlib.contextmanager
def out_of_memory_named(what: str, advice: str) -> Iterator[None]:
    """Turn running out of GPU memory inside the block into a DeviceError with `what` did not fit, and `advice`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free = "" if not torch.cuda.is_available() else f" ({torch.cuda.mem_get_info()[0] >> 20} MiB are free)"
        raise DeviceError(f"The GPU ran out of memory for {what}{free}. {advice}") from error
