"""Page-aligned memory for slots and bounce buffers."""

import mmap

from foreroute.transfer.files import BLOCK_BYTES

_HUGE_PAGE_BYTES = 2 * 2**20


def map_memory(num_bytes: int) -> mmap.mmap:
    """Anonymous memory, 4096-byte aligned, zero, taken from the system as it is touched.

    Private, as huge pages are not given to shared anonymous memory (which Python maps by default) on common kernels.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if num_bytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def allocate_slots(num_slots: int, slot_bytes: int) -> tuple[mmap.mmap, list[memoryview]]:
    """Memory for a pool, and each slot's part of it.

    Args:
        num_slots: slots in the pool.
        slot_bytes: length of one, a multiple of 4096, so that a disk can write to it directly.
    """
    assert slot_bytes > 0, "a slot has a length"
    assert slot_bytes % BLOCK_BYTES == 0, f"{slot_bytes} is not a multiple of {BLOCK_BYTES}"
    memory = map_memory(num_slots * slot_bytes)
    whole = memoryview(memory)
    return memory, [whole[slot * slot_bytes : (slot + 1) * slot_bytes] for slot in range(num_slots)]
