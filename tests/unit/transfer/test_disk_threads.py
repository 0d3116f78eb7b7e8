"""Who waits for whom: order, promotion, cancelling, closing and Ctrl-C, with reads held where the test wants them."""

import os
import signal
import threading
import time

import pytest

from foreroute.transfer.disk import DiskTransfer
from foreroute.transfer.load import Load
from tests.unit.transfer.expert_files import digest, make_slots, whole, write_file

PATIENCE_S = 30


class Gate:
    """Holds every read until it is let through; knows which have begun."""

    def __init__(self, monkeypatch):
        self.begun = []
        self._changed = threading.Condition()
        self._let_through = 0
        real = os.preadv

        def preadv(fd, buffers, offset):
            with self._changed:
                self.begun.append(offset // 4096)
                turn = len(self.begun)
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: self._let_through >= turn, PATIENCE_S)
            return real(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)

    def await_begun(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.begun) >= count, PATIENCE_S), self.begun

    def let_through(self, count=1):
        with self._changed:
            self._let_through += count
            self._changed.notify_all()

    def open(self):
        self.let_through(10**6)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


@pytest.fixture
def transfer(gate, tmp_path):
    """Key k is block k of a file; one reader."""
    path, content = write_file(tmp_path / "store", 10 * 4096)
    reads = [(whole(path, at, 4096, digest(content[at : at + 4096])),) for at in range(0, len(content), 4096)]
    slots = make_slots(10, 4096)
    transfer = DiskTransfer(reads.__getitem__, slots.__getitem__)
    transfer.slots, transfer.content = slots, content
    yield transfer
    gate.open()
    transfer.close()


def keys_of(completions):
    assert [completion.error for completion in completions] == [None] * len(completions)
    return [completion.key for completion in completions]


def drain(transfer):
    keys = []
    while transfer.num_in_flight:
        keys += keys_of(transfer.wait())
    return keys


def test_demands_overtake_queued_prefetches(transfer, gate):
    transfer.prefetch(0, 0)
    gate.await_begun(1)
    transfer.prefetch(1, 1)
    transfer.prefetch(2, 2)
    transfer.demand(3, 3)
    transfer.demand(4, 4)
    assert transfer.completed() == []
    assert transfer.num_in_flight == 5
    gate.open()
    assert sorted(drain(transfer)) == [0, 1, 2, 3, 4]
    assert gate.begun == [0, 3, 4, 1, 2]


def test_a_promoted_prefetch_overtakes_the_others(transfer, gate):
    transfer.demand(0, 0)
    gate.await_begun(1)
    for key in (1, 2, 3):
        transfer.prefetch(key, key)
    transfer.demand(4, 4)
    transfer.promote(3)
    transfer.promote(0)  # is being read: nothing happens
    gate.open()
    assert sorted(drain(transfer)) == [0, 1, 2, 3, 4]
    assert gate.begun == [0, 4, 3, 1, 2]


def test_only_a_request_that_has_not_started_is_cancelled(transfer, gate):
    transfer.demand(0, 0)
    gate.await_begun(1)
    transfer.prefetch(1, 1)
    transfer.demand(2, 2)
    transfer.prefetch(3, 3)
    assert transfer.cancel(1)
    assert transfer.cancel(2)
    assert not transfer.cancel(0)
    assert not transfer.cancel(9)
    assert transfer.num_in_flight == 2
    transfer.demand(1, 5)
    gate.open()
    assert sorted(drain(transfer)) == gate.begun == [0, 1, 3]
    assert transfer.slots[5][:] == transfer.content[4096:8192]
    assert not any(transfer.slots[1])
    assert not any(transfer.slots[2])


def test_completed_hands_out_each_completion_once(transfer, gate):
    transfer.demand(0, 0)
    transfer.demand(1, 1)
    assert transfer.completed() == []
    gate.let_through(1)
    assert keys_of(transfer.wait()) == [0]
    assert transfer.completed() == []
    assert transfer.num_in_flight == 1
    gate.let_through(1)
    assert keys_of(transfer.wait()) == [1]
    with pytest.raises(AssertionError, match="nothing is in flight"):
        transfer.wait()


def test_wait_hands_out_all_that_is_over(transfer, gate):
    for key in range(2):
        transfer.demand(key, key)
    gate.open()
    gate.await_begun(2)
    transfer.close()  # so both are over
    assert sorted(keys_of(transfer.wait())) == [0, 1]
    assert transfer.num_in_flight == 0


def test_close_finishes_what_is_being_read_and_drops_the_rest(transfer, gate):
    transfer.demand(0, 0)
    gate.await_begun(1)
    transfer.demand(1, 1)
    transfer.prefetch(2, 2)
    closing = threading.Thread(target=transfer.close)
    closing.start()
    time.sleep(0.05)
    assert closing.is_alive(), "it must wait for the read: the slot's memory may go away after it"
    gate.open()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert gate.begun == [0]
    assert transfer.slots[0][:] == transfer.content[:4096]
    assert transfer.num_in_flight == 1
    assert keys_of(transfer.completed()) == [0]
    transfer.close()
    with pytest.raises(AssertionError, match="closed"):
        transfer.demand(3, 3)


def test_close_leaves_no_thread_and_no_descriptor(gate, tmp_path):
    path, _ = write_file(tmp_path / "store", 8192)
    gate.open()
    slots = make_slots(2, 4096)
    before, others = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
    transfer = DiskTransfer(lambda key: (whole(path, key * 4096, 4096),), slots.__getitem__, num_threads=2)
    transfer.demand(0, 0)
    transfer.demand(1, 1)
    drain(transfer)
    threads = [one for one in threading.enumerate() if one.name.startswith("foreroute-") and one not in others]
    assert sorted(thread.name for thread in threads) == ["foreroute-finish", "foreroute-read-0", "foreroute-read-1"]
    assert all(thread.daemon for thread in threads)
    transfer.close()
    assert not any(thread.is_alive() for thread in threads)
    assert set(os.listdir("/proc/self/fd")) == before


def test_one_expert_is_put_in_place_while_the_next_is_read(transfer, gate, monkeypatch):
    """The checks and copies of the first are held until the read of the second has begun."""
    place = Load._place

    def wait_and_place(load):
        gate.await_begun(2)
        place(load)

    monkeypatch.setattr(Load, "_place", wait_and_place)
    transfer.demand(0, 0)
    transfer.demand(1, 1)
    gate.open()
    assert sorted(drain(transfer)) == [0, 1]


def test_a_lone_expert_is_put_in_place_by_the_thread_that_read_it(transfer, gate, monkeypatch):
    place, threads = Load._place, []
    monkeypatch.setattr(Load, "_place", lambda load: (threads.append(threading.current_thread().name), place(load)))
    gate.open()
    transfer.demand(0, 0)
    assert keys_of(transfer.wait()) == [0]
    assert threads == ["foreroute-read-0"]


def test_reading_stops_when_nothing_more_can_be_held(transfer, gate, monkeypatch):
    """A second expert is read while the first is being finished, a third is not: there is one spare buffer."""
    finishing, place = threading.Event(), Load._place
    monkeypatch.setattr(Load, "_place", lambda load: (finishing.wait(PATIENCE_S), place(load)))
    for key in range(4):
        transfer.demand(key, key)
    gate.open()
    gate.await_begun(2)
    time.sleep(0.05)
    assert gate.begun == [0, 1]
    finishing.set()
    assert sorted(drain(transfer)) == [0, 1, 2, 3]


def test_one_reader_reads_one_expert_at_a_time(transfer, gate):
    transfer.demand(0, 0)
    transfer.demand(1, 1)
    gate.await_begun(1)
    time.sleep(0.05)
    assert gate.begun == [0]


def test_two_readers_read_at_once(gate, tmp_path):
    path, _ = write_file(tmp_path / "store", 3 * 4096)
    slots = make_slots(3, 4096)
    transfer = DiskTransfer(lambda key: (whole(path, key * 4096, 4096),), slots.__getitem__, num_threads=2)
    try:
        for key in range(3):
            transfer.demand(key, key)
        gate.await_begun(2)
        assert sorted(gate.begun) == [0, 1]
        gate.open()
        assert sorted(drain(transfer)) == [0, 1, 2]
    finally:
        gate.open()
        transfer.close()


def test_ctrl_c_while_waiting_loses_nothing(transfer, gate):
    transfer.demand(0, 0)
    gate.await_begun(1)
    transfer.demand(1, 1)
    interrupt = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        transfer.wait()
    interrupt.join()
    assert transfer.num_in_flight == 2
    gate.open()
    assert sorted(drain(transfer)) == [0, 1]
    assert transfer.slots[1][:] == transfer.content[4096:8192]
