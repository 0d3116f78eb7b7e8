"""Memory that a disk can write to directly."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from foreroute.transfer.huge_pages import HUGE_PAGE_BYTES, HugePages
from foreroute.transfer.memory import allocate_slots, map_memory


def test_slots_are_aligned_apart_and_zero():
    memory, slots = allocate_slots(3, 8192)
    addresses = [np.frombuffer(slot, np.uint8).ctypes.data for slot in slots]
    assert [address % 4096 for address in addresses] == [0, 0, 0]
    assert [len(slot) for slot in slots] == [8192] * 3
    assert not any(slots[1])
    slots[1][:] = b"x" * 8192
    assert memory[8191:8193] == b"\0x"
    assert memory[16383:16385] == b"x\0"


def test_slots_stay_when_only_one_of_them_is_held():
    slot = allocate_slots(2, 4096)[1][1]
    slot[:] = b"y" * 4096
    assert bytes(slot) == b"y" * 4096


def test_a_slot_that_a_disk_cannot_write_to_is_refused():
    with pytest.raises(AssertionError, match="multiple of 4096"):
        allocate_slots(2, 5000)


def _bytes_on_huge_pages(address: int) -> int:
    """AnonHugePages of the mapping that holds `address`, as the system tells it."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
        elif inside and first == "AnonHugePages:":
            return int(rest.split()[0]) * 1024
    raise AssertionError(f"nothing is mapped at {address:x}")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says which pages are huge")
def test_pages_that_fell_back_to_small_ones_are_made_huge():
    memory = map_memory(8 * HUGE_PAGE_BYTES)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # as where free memory is in pieces: faults get small pages
    memory[0 :: mmap.PAGESIZE] = b"\0" * (len(memory) // mmap.PAGESIZE)
    assert _bytes_on_huge_pages(address) == 0
    memory.madvise(mmap.MADV_HUGEPAGE)
    pages = HugePages(memory)
    pages.prepare(0, len(memory))
    if pages.num_refused:
        pytest.skip("this system does not move memory to huge pages (Linux 6.1, transparent_hugepage=madvise)")
    assert _bytes_on_huge_pages(address) >= 7 * HUGE_PAGE_BYTES


def test_preparing_keeps_what_was_written_to_pages_prepared_before():
    memory = map_memory(6 * HUGE_PAGE_BYTES)
    pages = HugePages(memory)
    third = len(memory) // 3 + 4096  # no whole number of pages: neighbours share one
    whole = memoryview(memory)
    starts = [0, third, 2 * third]
    for number, start in enumerate(starts):
        part = whole[start : start + third]
        pages.prepare(start, len(part))
        part[:] = bytes([number + 1]) * len(part)
    for number, start in enumerate(starts):
        assert set(bytes(whole[start : start + third])) == {number + 1}


def test_a_mapping_shorter_than_a_huge_page_is_left_as_it_is():
    memory = map_memory(8192)
    HugePages(memory).prepare(0, 8192)
    assert not any(memory[:])
