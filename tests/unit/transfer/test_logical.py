"""By logical time, what is seen depends on what was asked for, and not on when reads end."""

import itertools

import pytest

from foreroute.transfer.wrappers import LogicalTransfer
from tests.support.fake_transfer import FakeTransfer


def keys_of(completions):
    return [one.key for one in completions]


def asked(order):
    """Two demands, two prefetches and a deferred load; the copies end in this order in `wait`."""
    inner = FakeTransfer()
    transfer = LogicalTransfer(inner)
    transfer.prefetch(5, 0)
    transfer.demand(9, 1)
    transfer.defer(3, 2)
    transfer.demand(1, 3)
    transfer.prefetch(7, 4)
    ends = iter(order)
    inner.wait = lambda: (inner.finish(next(ends)), inner.completed())[1]
    return transfer


@pytest.mark.parametrize("order", list(itertools.permutations([5, 9, 3, 1, 7])))
def test_every_order_looks_alike(order):
    transfer = asked(order)
    # Awaited ones, by key; others that have ended do not show yet.
    assert keys_of(transfer.wait()) == [1, 9]
    assert transfer.num_in_flight == 3
    assert keys_of(transfer.completed()) == [3, 5, 7]
    assert transfer.num_in_flight == 0
    assert transfer.completed() == []


def test_a_promoted_read_is_waited_for():
    transfer = asked([5, 9, 3, 1, 7])
    transfer.promote(7)
    assert keys_of(transfer.wait()) == [1, 7, 9]
    assert keys_of(transfer.wait()) == [3, 5], "with nothing demanded everything is waited for"


def test_nothing_is_cancelled():
    transfer = asked([5, 9, 3, 1, 7])
    assert not transfer.cancel(5)
    assert transfer.num_in_flight == 5


def test_reset_forgets_demands_and_what_was_held():
    transfer = asked([3, 9, 1, 5, 7])
    transfer.wait()
    transfer.reset()
    assert transfer.num_in_flight == 0
    transfer.prefetch(2, 0)
    transfer._inner.finish(2)
    transfer._inner.wait = transfer._inner.completed
    assert keys_of(transfer.wait()) == [2]
