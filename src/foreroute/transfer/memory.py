"""Page-aligned memory for slots and bounce buffers."""

import mmap
from collections.abc import Sequence

from foreroute.transfer.files import BLOCK_BYTES
from foreroute.types import SlotClass

_HUGE_PAGE_BYTES = 2 * 2**20


def map_memory(num_bytes: int) -> mmap.mmap:
    """Map at least `num_bytes` of anonymous memory: 4096-byte aligned, zero, committed as it is touched.

    On huge pages where available: O_DIRECT pins every page that it writes to, which on small ones halves the rate of a
    fast disk (1.1 against 2.3 GB/s, benchmarks/disk.py). The system gives them to private mappings only (Python's
    default is shared), and throughout only to one whose length is a whole number of them.
    """
    if num_bytes < _HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    num_bytes = -(-num_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
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
