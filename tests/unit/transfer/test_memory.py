"""Memory that a disk can write to directly."""

import numpy as np
import pytest

from foreroute.transfer.memory import allocate_slots


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
