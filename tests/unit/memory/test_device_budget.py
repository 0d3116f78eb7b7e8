"""A GPU's memory and the host's, by made-up numbers: what is chosen, and what is said when nothing would do."""

import pytest

from foreroute.errors import BudgetError, DeviceError
from foreroute.memory.budget import DeviceNeeds, check_dense, choose_device_memory, choose_host_records, prefill_bytes

GIB = 2**30
NEEDS = DeviceNeeds(dense_bytes=3 * GIB, kv_bytes=GIB, prefill_bytes=GIB // 2, buffer_bytes=GIB // 2, max_rows=8)


def test_everything_is_counted_once() -> None:
    lost = int(24 * GIB * 0.03) + 192 * 2**20
    assert NEEDS.all_bytes(24 * GIB) == 5 * GIB + 64 * 2**20 + lost
    assert DeviceNeeds(0, 0, 0).all_bytes(GIB) == (256 + 192) * 2**20
    assert prefill_bytes(100, 10, 1000, 2) == 100 * (320 + 6000)


def test_what_is_left_is_filled_and_never_more_than_all_experts() -> None:
    left = 23 * GIB - NEEDS.all_bytes(24 * GIB)
    assert choose_device_memory(None, NEEDS, 23 * GIB, 24 * GIB, 60 * GIB, GIB) == left
    assert left + NEEDS.all_bytes(24 * GIB) <= 23 * GIB
    assert choose_device_memory(None, NEEDS, 23 * GIB, 24 * GIB, 2 * GIB, GIB) == 2 * GIB


def test_what_was_asked_for_is_given_or_refused() -> None:
    assert choose_device_memory("10GiB", NEEDS, 23 * GIB, 24 * GIB, 60 * GIB, GIB) == 10 * GIB
    assert choose_device_memory("25%", NEEDS, 23 * GIB, 24 * GIB, 60 * GIB, GIB) == 15 * GIB
    assert choose_device_memory("100%", NEEDS, 23 * GIB, 24 * GIB, 8 * GIB, GIB) == 8 * GIB
    with pytest.raises(BudgetError, match=r"--memory 20GiB is 20\.0 GiB; .* the GPU has 17\.0 GiB left"):
        choose_device_memory("20GiB", NEEDS, 23 * GIB, 24 * GIB, 60 * GIB, GIB)


def test_a_gpu_too_small_for_the_dense_part_says_what_is_how_large() -> None:
    with pytest.raises(DeviceError, match=r"4\.0 GiB free of 8\.0 GiB.*dense weights 3\.0 GiB.*bfloat16"):
        check_dense(NEEDS, 4 * GIB, 8 * GIB)
    with pytest.raises(DeviceError, match="Lower --kv-tokens"):
        check_dense(DeviceNeeds(GIB, 9 * GIB, 0), 8 * GIB, 8 * GIB)
    with pytest.raises(DeviceError, match="Lower --prefill-chunk"):
        check_dense(DeviceNeeds(GIB, 0, 9 * GIB), 8 * GIB, 8 * GIB)
    check_dense(NEEDS, 24 * GIB, 24 * GIB)


def test_too_little_for_one_token_is_said_before_it_is_tried() -> None:
    free = NEEDS.all_bytes(24 * GIB) + GIB // 2
    with pytest.raises(DeviceError, match=r"512\.0 MiB left; one token's experts need 1\.0 GiB"):
        choose_device_memory(None, NEEDS, free, 24 * GIB, 60 * GIB, GIB)


def test_host_memory() -> None:
    def chosen(asked, available=64 * GIB, *, must_hold_all=False) -> int:
        return choose_host_records(asked, available, GIB, 32, must_hold_all=must_hold_all)

    assert chosen(None) == 32
    assert chosen(None, 20 * GIB) == 16, "four GiB are left to the system"
    assert chosen("50%") == 16
    assert chosen("8.5GiB") == 8
    assert chosen("500GiB", 40 * GIB) == 32, "no more than there are experts"
    assert chosen(None, must_hold_all=True) == 32
    with pytest.raises(DeviceError, match=r"30\.0 GiB; this machine has 20\.0 GiB free"):
        chosen("30GiB", 20 * GIB)
    with pytest.raises(DeviceError, match=r"room for 16 of 32 experts.*Use --control host"):
        chosen("50%", must_hold_all=True)
    with pytest.raises(DeviceError, match="hold no expert"):
        chosen(None, 3 * GIB)
