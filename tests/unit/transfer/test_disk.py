"""Real files, real threads: the bytes that arrive, and the errors when they do not."""

import errno
import fcntl
import os
import random

import pytest

from foreroute.errors import ChecksumError, ReadError
from foreroute.transfer.disk import DiskTransfer
from foreroute.types import Copy, Read
from tests.unit.transfer.expert_files import SLOT_BYTES, digest, flat, make_slots, whole, write_file

GUARD = 0xEE


@pytest.fixture
def disk():
    """Makes transfers over given reads and closes them; their slots are full of GUARD bytes."""
    opened = []

    def make(reads_by_key, **options):
        slots = make_slots()
        for slot in slots:
            slot[:] = bytes([GUARD]) * len(slot)
        transfer = DiskTransfer(
            reads_by_key.__getitem__, slots.__getitem__, label=lambda key: f"expert {key} of MoE layer 7", **options
        )
        opened.append(transfer)
        return transfer, slots

    yield make
    for transfer in opened:
        transfer.close()


@pytest.fixture
def preadv_calls(monkeypatch):
    """(offset, length) of each read that the system is asked for."""
    calls = []
    real = os.preadv

    def preadv(fd, buffers, offset, *flags):
        calls.append((offset, sum(len(buffer) for buffer in buffers)))
        return real(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    return calls


def arrive(transfer, count):
    completions = []
    while len(completions) < count:
        completions += transfer.wait()
    return sorted(completions, key=lambda completion: completion.key)


def the_error(transfer):
    (completion,) = arrive(transfer, 1)
    assert completion.nbytes == 0
    assert completion.error is not None
    return completion.error


def test_a_packed_record_lands_in_its_slot_in_one_read(disk, tmp_path, preadv_calls):
    path, content = write_file(tmp_path / "store", 4 * 8192)
    transfer, slots = disk({3: (whole(path, 8192, 8000, digest(content[8192:16192])),)})
    transfer.demand(3, 1)
    assert [one[:4] for one in transfer.wait()] == [(3, 1, None, 8000)]
    assert slots[1][:8000] == content[8192:16192]
    assert slots[1][8192:] == bytes([GUARD]) * (SLOT_BYTES - 8192)
    assert slots[0][:] == slots[2][:] == bytes([GUARD]) * SLOT_BYTES
    assert preadv_calls == [(8192, 8192)]
    assert (transfer.num_in_flight, transfer.reads, transfer.bytes_read) == (0, 1, 8192)
    assert transfer.busy_s > 0


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_unaligned_parts_are_put_together(disk, tmp_path, direct, num_threads):
    path, content = write_file(tmp_path / "a.safetensors", 50_001)
    other, other_content = write_file(tmp_path / "b.safetensors", 9_999, seed=1)
    reads = {
        key: (
            Read(path, 1000 * key + 7, 3000, (flat(1000, 0, 64), flat(2000, 1000, 4096))),
            Read(other, 100 * key + 1, 600, (Copy(0, 8192, 10, 30, 2, 2, 20),)),
        )
        for key in range(30)
    }
    transfer, slots = disk(reads, direct=direct, num_threads=num_threads)
    for start in range(0, 28, 4):
        for slot in range(4):
            transfer.demand(start + slot, slot)
        assert [completion.error for completion in arrive(transfer, 4)] == [None] * 4
        for slot in range(4):
            key = start + slot
            part = content[1000 * key + 7 : 1000 * key + 3007]
            rows = other_content[100 * key + 1 : 100 * key + 601]
            columns = b"".join(rows[60 * row + 2 * col :][:2] for col in range(30) for row in range(10))
            expected = bytearray([GUARD]) * SLOT_BYTES
            expected[64:1064] = part[:1000]
            expected[4096:6096] = part[1000:]
            expected[8192:8792] = columns
            assert slots[slot][:] == expected
            slots[slot][:] = bytes([GUARD]) * SLOT_BYTES


def test_reads_of_unaligned_ranges_cover_whole_blocks(disk, tmp_path, preadv_calls):
    path, content = write_file(tmp_path / "a", 5 * 4096)
    transfer, slots = disk({0: (whole(path, 4095, 4098),)})
    transfer.demand(0, 0)
    assert [one[:4] for one in transfer.wait()] == [(0, 0, None, 4098)]
    assert preadv_calls == [(0, 3 * 4096)]
    assert slots[0][:4098] == content[4095:8193]
    assert slots[0][4098:] == bytes([GUARD]) * (SLOT_BYTES - 4098)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_padding_of_one_part_never_covers_another(disk, tmp_path, order):
    """An aligned part that could be read straight into the slot would bring 4096 - 100 bytes too many."""
    path, content = write_file(tmp_path / "a", 3 * 4096)
    parts = (Read(path, 0, 50, (flat(50, 0, 100),)), whole(path, 4096, 100))
    transfer, slots = disk({0: tuple(parts[index] for index in order)})
    transfer.demand(0, 0)
    assert [one[:4] for one in transfer.wait()] == [(0, 0, None, 150)]
    assert slots[0][:150] == content[4096:4196] + content[:50]
    assert slots[0][150:] == bytes([GUARD]) * (SLOT_BYTES - 150)


def test_bytes_that_no_copy_names_stay_out_of_the_slot(disk, tmp_path):
    path, content = write_file(tmp_path / "a", 4096)
    transfer, slots = disk({0: (Read(path, 0, 200, (flat(100),)),)})
    transfer.demand(0, 0)
    assert transfer.wait()[0].error is None
    assert slots[0][:100] == content[:100]
    assert slots[0][100:] == bytes([GUARD]) * (SLOT_BYTES - 100)


def test_a_record_at_the_unpadded_end_of_a_file_is_read(disk, tmp_path):
    path, content = write_file(tmp_path / "a", 4096 + 10)
    transfer, slots = disk({0: (whole(path, 4096, 10),), 1: (whole(path, 4000, 106),)})
    transfer.demand(0, 0)
    transfer.demand(1, 1)
    assert [completion.error for completion in arrive(transfer, 2)] == [None, None]
    assert slots[0][:10] == content[4096:]
    assert slots[1][:106] == content[4000:]


@pytest.mark.parametrize("offset", [8192, 8000])
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_is_too_short_is_named(disk, tmp_path, offset, direct):
    path, _ = write_file(tmp_path / "short.safetensors", 10_000)
    transfer, _ = disk({5: (whole(path, offset, 4000),)}, direct=direct)
    transfer.demand(5, 0)
    error = the_error(transfer)
    assert isinstance(error, ReadError)
    message = str(error)
    assert f"Reading expert 5 of MoE layer 7 from {path} at offset {offset}" in message
    assert f"ends at byte 10000, {offset + 4000 - 10_000} bytes too early" in message
    assert "Get the file again" in message


def test_a_file_that_ends_far_before_the_range_is_named(disk, tmp_path):
    path, _ = write_file(tmp_path / "short", 100)
    transfer, _ = disk({5: (whole(path, 8192, 10),)})
    transfer.demand(5, 0)
    assert "ends at byte" in str(the_error(transfer))


@pytest.mark.parametrize("offset", [4096, 5000])
def test_a_flipped_bit_is_named(disk, tmp_path, offset):
    path, content = write_file(tmp_path / "store", 16384)
    reads = {1: (whole(path, offset, 4000, digest(content[offset : offset + 4000])),)}
    damaged = bytearray(content)
    damaged[offset + 3999] ^= 1
    (tmp_path / "store").write_bytes(damaged)
    transfer, _ = disk(reads)
    transfer.demand(1, 0)
    error = the_error(transfer)
    assert isinstance(error, ChecksumError)
    assert f"Reading expert 1 of MoE layer 7 from {path} at offset {offset}" in str(error)
    assert "Pack the model again" in str(error)


def test_a_byte_beside_the_range_is_not_checked(disk, tmp_path):
    path, content = write_file(tmp_path / "store", 16384)
    transfer, _ = disk({1: (whole(path, 4096, 4000, digest(content[4096:8096])),)})
    damaged = bytearray(content)
    damaged[8096] ^= 1
    damaged[4095] ^= 1
    (tmp_path / "store").write_bytes(damaged)
    transfer.demand(1, 0)
    assert transfer.wait()[0].error is None


def test_a_failing_disk_is_named_and_the_thread_lives_on(disk, tmp_path, monkeypatch):
    path, content = write_file(tmp_path / "store", 16384)
    transfer, slots = disk({1: (whole(path, 0, 4096),), 2: (whole(path, 4096, 4096),)})

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        transfer.demand(1, 0)
        error = the_error(transfer)
    assert isinstance(error, ReadError)
    assert f"from {path} at offset 0: Input/output error" in str(error)
    assert error.__cause__.errno == errno.EIO
    transfer.demand(2, 0)
    assert [one[:4] for one in transfer.wait()] == [(2, 0, None, 4096)]
    assert slots[0][:4096] == content[4096:8192]
    assert transfer.buffered_paths == []


def test_a_missing_file_is_named(disk, tmp_path):
    transfer, _ = disk({1: (whole(os.fspath(tmp_path / "gone"), 0, 10),)})
    transfer.demand(1, 0)
    error = the_error(transfer)
    assert isinstance(error, ReadError)
    assert "gone at offset 0: No such file or directory" in str(error)


def test_our_own_bug_in_the_thread_reaches_the_caller(disk):
    transfer, _ = disk({})
    transfer.demand(1, 0)
    assert isinstance(the_error(transfer), KeyError)
    assert transfer.num_in_flight == 0


@pytest.mark.parametrize("where", ["open", "read"])
@pytest.mark.parametrize("offset", [4096, 5001])
def test_where_o_direct_is_refused_the_page_cache_serves(disk, tmp_path, monkeypatch, where, offset):
    path, content = write_file(tmp_path / "refusing", 20_000)
    other, other_content = write_file(tmp_path / "willing", 20_000, seed=1)
    real_open, real_preadv = os.open, os.preadv
    direct_opens = []
    before = set(os.listdir("/proc/self/fd"))

    def refuse():
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def open_(name, flags, *rest):
        if name == path and flags & os.O_DIRECT:
            direct_opens.append(name)
            if where == "open":
                refuse()
        return real_open(name, flags, *rest)

    def preadv(fd, *rest):
        is_direct = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        if is_direct and os.readlink(f"/proc/self/fd/{fd}") == path:
            refuse()
        return real_preadv(fd, *rest)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    transfer, slots = disk({0: (whole(path, offset, 6000),), 1: (whole(other, offset, 6000),)})
    for _ in range(2):
        transfer.demand(0, 0)
        transfer.demand(1, 1)
        assert [completion.error for completion in arrive(transfer, 2)] == [None, None]
    assert slots[0][:6000] == content[offset : offset + 6000]
    assert slots[1][:6000] == other_content[offset : offset + 6000]
    assert path in transfer.buffered_paths
    assert direct_opens == [path]
    transfer.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_o_direct_is_asked_for_unless_told_not_to(disk, tmp_path, monkeypatch):
    path, _ = write_file(tmp_path / "store", 8192)
    flags_seen = []
    real_open = os.open
    monkeypatch.setattr(
        os, "open", lambda name, flags, *rest: flags_seen.append(flags) or real_open(name, flags, *rest)
    )
    for direct in (True, False):
        transfer, _ = disk({0: (whole(path, 0, 8192),)}, direct=direct)
        for _ in range(2):
            transfer.demand(0, 0)
            transfer.wait()
        assert bool(flags_seen[0] & os.O_DIRECT) == direct
        assert (path in transfer.buffered_paths) >= (not direct)
        flags_seen.clear()


@pytest.mark.parametrize(("direct", "most"), [(True, 4096), (False, 1000)])
def test_short_reads_are_continued(disk, tmp_path, monkeypatch, direct, most):
    path, content = write_file(tmp_path / "store", 20_000)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:most]], offset))
    transfer, slots = disk({0: (whole(path, 4096, 12_000),), 1: (whole(path, 111, 12_000),)}, direct=direct)
    transfer.demand(0, 0)
    transfer.demand(1, 1)
    assert [completion.error for completion in arrive(transfer, 2)] == [None, None]
    assert slots[0][:12_000] == content[4096:16_096]
    assert slots[1][:12_000] == content[111:12_111]


def test_a_direct_read_that_stops_inside_a_block_goes_on_at_its_start(disk, tmp_path, monkeypatch):
    path, content = write_file(tmp_path / "store", 20_000)
    real, real_open, offsets = os.preadv, os.open, []
    # So that the test means the same where the temporary folder refuses O_DIRECT.
    monkeypatch.setattr(os, "open", lambda name, flags, *rest: real_open(name, flags & ~os.O_DIRECT, *rest))

    def preadv(fd, buffers, offset):
        offsets.append(offset)
        num_bytes = real(fd, buffers, offset)
        return min(num_bytes, 5000) if len(offsets) == 1 else num_bytes

    monkeypatch.setattr(os, "preadv", preadv)
    transfer, slots = disk({0: (whole(path, 4096, 12_000),)})
    transfer.demand(0, 0)
    assert transfer.wait()[0].error is None
    assert slots[0][:12_000] == content[4096:16_096]
    assert offsets == [4096, 8192]


def test_a_bounce_buffer_grows_with_the_parts(disk, tmp_path):
    path, content = write_file(tmp_path / "store", 40_000)
    sizes = [10, 12_000, 100, 16_000]
    reads = {key: (whole(path, 1 + key, nbytes),) for key, nbytes in enumerate(sizes)}
    transfer, slots = disk(reads)
    for key, nbytes in enumerate(sizes):
        transfer.demand(key, key)
        assert transfer.wait()[0].error is None
        assert slots[key][:nbytes] == content[1 + key : 1 + key + nbytes]


def test_many_random_requests_from_two_threads(disk, tmp_path):
    rng = random.Random(5)
    path, content = write_file(tmp_path / "store", 200_000)
    ranges = {key: (rng.randrange(150_000), rng.randrange(1, SLOT_BYTES)) for key in range(60)}
    reads = {
        key: (whole(path, offset, nbytes, digest(content[offset : offset + nbytes])),)
        for key, (offset, nbytes) in ranges.items()
    }
    transfer, slots = disk(reads, num_threads=2)
    waiting, free, seen = list(ranges), [0, 1, 2, 3], set()
    while len(seen) < len(ranges):
        while waiting and free:
            rng.choice([transfer.demand, transfer.prefetch])(waiting.pop(), free.pop())
        for completion in transfer.wait():
            assert completion.error is None
            offset, nbytes = ranges[completion.key]
            assert slots[completion.slot][:nbytes] == content[offset : offset + nbytes]
            free.append(completion.slot)
            seen.add(completion.key)
    assert transfer.reads == 60
    assert transfer.num_in_flight == 0
