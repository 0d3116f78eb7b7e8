"""Arena, copies and the disk behind them: the right bytes in the right slots, demands first, nothing lost."""

import random

import pytest
import torch

from foreroute.errors import DeviceError, ReadError
from foreroute.transfer.disk import DiskTransfer
from foreroute.transfer.memory import Arena, load_records
from foreroute.transfer.tiered import MOST_COPIES, MOST_READS, MemoryCopier, TieredTransfer
from tests.support.fake_transfer import FakeTransfer
from tests.unit.transfer.expert_files import whole, write_file

RECORD = 4096
NUM_KEYS = 24


class SlowCopier:
    """Copies end, in order, when the test says so; `started` is [(record, slot)]."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []
        self.num_done = 0
        self.closed = False

    def start(self, record: int, slot: int) -> int:
        self.started.append((record, slot))
        return len(self.started)

    def is_done(self, ticket: int) -> bool:
        return ticket <= self.num_done

    def wait(self, ticket: int) -> None:
        self.num_done = max(self.num_done, ticket)

    def close(self) -> None:
        self.closed = True


def all_in_memory(copier: SlowCopier) -> TieredTransfer:
    return TieredTransfer(copier, range(NUM_KEYS), NUM_KEYS, None, lambda key: 100 + key)


@pytest.fixture
def files(tmp_path):
    """(reads of a key, a key's bytes)."""
    path, content = write_file(tmp_path / "experts", NUM_KEYS * RECORD)
    return (
        lambda key: (whole(path, key * RECORD, RECORD),),
        lambda key: content[key * RECORD : (key + 1) * RECORD],
    )


def test_few_copies_at_a_time_and_demands_before_guesses() -> None:
    copier = SlowCopier()
    transfer = all_in_memory(copier)
    for key in range(6):
        transfer.prefetch(key, key)
    transfer.demand(9, 9)
    transfer.promote(5)
    assert copier.started == [(key, key) for key in range(MOST_COPIES)]
    assert transfer.num_in_flight == 7
    copier.num_done = 2
    assert [(one.key, one.slot, one.nbytes) for one in transfer.completed()] == [(0, 0, 100), (1, 1, 101)]
    assert copier.started[MOST_COPIES:] == [(9, 9), (5, 5)]
    assert transfer.cancel(4)
    assert not transfer.cancel(9), "a copy that has begun goes on"
    assert [one.key for one in transfer.wait()] == [2]
    assert transfer.num_in_flight == 3
    assert transfer.bytes_read == 100 + 101 + 102


def test_reset_forgets_and_close_closes() -> None:
    copier = SlowCopier()
    transfer = all_in_memory(copier)
    for key in range(8):
        transfer.demand(key, key)
    transfer.reset()
    assert (transfer.num_in_flight, transfer.completed()) == (0, [])
    assert len(copier.started) == MOST_COPIES
    transfer.demand(0, 3)
    assert [one.slot for one in transfer.wait()] == [3]
    transfer.close()
    transfer.close()
    assert copier.closed


def test_what_is_not_in_memory_comes_from_disk_and_the_least_recently_used_is_evicted() -> None:
    copier, disk = SlowCopier(), FakeTransfer()
    transfer = TieredTransfer(copier, [], 2, disk, lambda key: 1)
    transfer.demand(7, 70)
    transfer.demand(8, 80)
    transfer.demand(9, 90)
    assert [call[:2] for call in disk.calls] == [("demand", 7), ("demand", 8)], "there are two records"
    assert not transfer.cancel(7)
    disk.begin()
    disk.finish(7)
    assert transfer.completed() == []
    assert copier.started == [(disk.calls[0][2], 70)]
    copier.num_done = 1
    assert [one.key for one in transfer.completed()] == [7]
    transfer.prefetch(7, 71)  # in memory: no read
    assert len(disk.calls) == 2
    copier.num_done = 2
    assert [one.slot for one in transfer.completed()] == [71]
    assert len(disk.calls) == 2, "both records are asked for: 9 waits"
    transfer.completed()
    assert disk.calls[2] == ("demand", 9, disk.calls[0][2]), "7 is evicted for 9"


def test_what_was_asked_for_again_stays_and_a_reset_loses_no_record() -> None:
    copier, disk = SlowCopier(), FakeTransfer(finish_on_wait=True)
    copier.num_done = 1000
    transfer = TieredTransfer(copier, [], 2, disk, lambda key: 1)
    for key in (1, 2, 1, 3):  # 3 takes the place of 2
        transfer.demand(key, 0)
        transfer.wait()
    num_reads = len(disk.calls)
    transfer.demand(1, 0)
    transfer.wait()
    assert len(disk.calls) == num_reads == 3
    for _ in range(3):  # each cut off while it is being read
        transfer.demand(8, 0)
        transfer.demand(9, 1)
        assert disk.num_in_flight == 2
        transfer.reset()
    transfer.demand(9, 0)
    assert [one.key for one in transfer.wait()] == [9]


def test_an_error_of_the_disk_travels_with_its_slot() -> None:
    disk = FakeTransfer()
    transfer = TieredTransfer(SlowCopier(), [], 1, disk, lambda key: 1)
    transfer.demand(3, 30)
    disk.begin()
    disk.fail(3, ReadError("gone"))
    (over,) = transfer.wait()
    assert (over.key, over.slot, str(over.error)) == (3, 30, "gone")
    transfer.demand(3, 30)
    assert len(disk.calls) == 2, "its record is free again"


def test_reads_at_once_are_bounded() -> None:
    disk = FakeTransfer()
    transfer = TieredTransfer(SlowCopier(), [], 20, disk, lambda key: 1)
    for key in range(10):
        transfer.defer(key, key)
    transfer.demand(20, 20)
    assert len(disk.calls) == MOST_READS
    disk.finish(disk.begin())
    transfer.completed()
    assert disk.calls[-1][:2] == ("demand", 20)


@pytest.mark.parametrize("num_records", [1, 5, NUM_KEYS])
def test_any_order_of_requests_brings_the_right_bytes(files, num_records: int) -> None:
    reads_of, content = files
    arena, slots = Arena(num_records, RECORD), torch.zeros(8, RECORD, dtype=torch.uint8)
    disk = DiskTransfer(reads_of, arena.records.__getitem__, num_threads=2)
    keys = list(range(NUM_KEYS)) if num_records == NUM_KEYS else []
    load_records(disk, keys)
    transfer = TieredTransfer(MemoryCopier(arena.tensor, slots), keys, num_records, disk, lambda key: RECORD)
    chance, asked, num_done = random.Random(num_records), {}, 0
    for _ in range(600):
        free = [slot for slot in range(8) if slot not in asked.values()]
        key = chance.randrange(NUM_KEYS)
        action = chance.choice(["demand", "prefetch", "defer", "cancel", "promote", "wait", "completed"])
        if action in ("demand", "prefetch", "defer") and free and key not in asked:
            getattr(transfer, action)(key, free[0])
            asked[key] = free[0]
        elif action == "cancel" and key in asked and transfer.cancel(key):
            del asked[key]
        elif action == "promote":
            transfer.promote(key)
        elif action == "completed" or (action == "wait" and asked):
            for one in getattr(transfer, action)():
                assert asked.pop(one.key) == one.slot
                assert bytes(slots[one.slot].numpy()) == content(one.key)
                num_done += 1
        assert transfer.num_in_flight == len(asked)
    assert num_done > 40
    transfer.close()
    arena.close()


def test_loading_tells_how_far_it_is_and_raises_what_the_disk_says(files, tmp_path) -> None:
    reads_of, content = files
    arena, told = Arena(3, RECORD), []
    disk = DiskTransfer(reads_of, arena.records.__getitem__, num_threads=2)
    load_records(disk, [5, 0, 9], lambda done, total: told.append((done, total)))
    assert told[-1] == (3, 3)
    assert [bytes(record) for record in arena.records] == [content(5), content(0), content(9)]
    assert bytes(arena.tensor[2].numpy()) == content(9)
    assert arena.address % 4096 == 0
    disk.close()
    disk = DiskTransfer(lambda key: (whole(str(tmp_path / "absent"), 0, 10),), arena.records.__getitem__)
    with pytest.raises(ReadError, match="absent"):
        load_records(disk, [1, 2])
    assert disk.num_in_flight == 0
    disk.close()


def test_memory_that_cannot_be_pinned_is_reported_and_freed(monkeypatch) -> None:
    class Runtime:
        def cudaHostRegister(self, address, nbytes, flags) -> int:
            assert nbytes == 3 * RECORD
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    with pytest.raises(DeviceError, match=r"12\.0 KiB.*cannot be pinned.*Lower --host-memory.*memlock"):
        Arena(3, RECORD, is_pinned=True)


def test_pinned_memory_is_unregistered_once(monkeypatch) -> None:
    calls = []

    class Runtime:
        def cudaHostRegister(self, address, nbytes, flags) -> int:
            calls.append(("register", address, nbytes))
            return 0

        def cudaHostUnregister(self, address) -> int:
            calls.append(("unregister", address))
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    arena = Arena(2, RECORD, is_pinned=True)
    address = arena.address
    arena.close()
    arena.close()
    assert calls == [("register", address, 2 * RECORD), ("unregister", address)]
