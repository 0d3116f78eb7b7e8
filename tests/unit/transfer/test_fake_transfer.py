"""The transfer that tests drive."""

import pytest

from foreroute.transfer.base import Completion
from tests.support.fake_transfer import FakeTransfer


def test_copies_finish_when_the_test_says_so():
    transfer = FakeTransfer(fill=lambda key, slot: 100 * key + slot)
    transfer.prefetch(1, 5)
    transfer.demand(2, 6)
    assert transfer.completed() == []
    transfer.finish(2)
    transfer.fail(1, OSError("broken"))
    assert transfer.num_in_flight == 2
    first, second = transfer.wait()
    assert first == Completion(2, 6, None, 206)
    assert (second.key, second.slot, str(second.error), second.nbytes) == (1, 5, "broken", 0)
    assert (transfer.num_in_flight, transfer.bytes_read, transfer.reads) == (0, 206, 1)
    assert transfer.calls == [("prefetch", 1, 5), ("demand", 2, 6)]


def test_what_has_begun_cannot_be_cancelled():
    transfer = FakeTransfer()
    transfer.prefetch(1, 5)
    transfer.prefetch(2, 6)
    transfer.promote(2)
    assert transfer.begin() == 2
    assert not transfer.cancel(2)
    assert transfer.cancel(1)
    assert transfer.in_flight == [2]
    transfer.finish(2)
    transfer.completed()
    transfer.demand(2, 7)
    assert transfer.calls[2:] == [("promote", 2), ("cancel", 2), ("cancel", 1), ("demand", 2, 7)]


def test_waiting_for_what_the_test_never_finishes_fails_the_test():
    transfer = FakeTransfer()
    with pytest.raises(AssertionError, match="nothing is in flight"):
        transfer.wait()
    transfer.demand(3, 0)
    with pytest.raises(AssertionError, match=r"finished none of \[3\]"):
        transfer.wait()


def test_it_can_finish_by_itself_demands_first():
    transfer = FakeTransfer(finish_on_wait=True)
    transfer.prefetch(1, 0)
    transfer.demand(2, 1)
    assert [completion.key for completion in transfer.wait()] == [2]
    assert [completion.key for completion in transfer.wait()] == [1]


def test_close_drops_what_was_not_begun():
    transfer = FakeTransfer()
    transfer.demand(1, 0)
    transfer.demand(2, 1)
    transfer.begin()
    transfer.close()
    assert transfer.in_flight == [1]
    with pytest.raises(AssertionError, match="closed"):
        transfer.demand(3, 2)
