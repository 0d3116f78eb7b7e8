"""Which request is next: demands first, each class in its order."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from foreroute.transfer.base import TransferQueue


def served(queue):
    """Keys in the order in which they would be served from now on."""
    keys = []
    while (request := queue.next()) is not None:
        keys.append(request[0])
        queue.finished(request[0])
    return keys


def test_demands_are_served_before_prefetches_each_in_order():
    queue = TransferQueue()
    queue.prefetch(1, 10)
    queue.demand(2, 20)
    queue.prefetch(3, 30)
    queue.demand(4, 40)
    assert len(queue) == 4
    assert queue.next() == (2, 20)
    queue.demand(5, 50)
    assert served(queue) == [4, 5, 1, 3]
    assert queue.next() is None


def test_a_promoted_prefetch_goes_behind_the_demands():
    queue = TransferQueue()
    for key in (1, 2, 3):
        queue.prefetch(key, key)
    queue.demand(4, 4)
    assert queue.promote(3)
    queue.demand(5, 5)
    assert served(queue) == [4, 3, 5, 1, 2]


def test_deferred_loads_wait_but_not_for_ever():
    queue = TransferQueue()
    for key in (1, 2):
        queue.defer(key, key)
    for key in (11, 12, 13, 14, 15, 16, 17):
        queue.prefetch(key, key)
    queue.demand(21, 21)
    assert len(queue) == 10
    assert served(queue) == [21, 11, 12, 13, 1, 14, 15, 16, 2, 17]


def test_a_deferred_load_can_be_promoted_and_cancelled():
    queue = TransferQueue()
    for key in (1, 2, 3):
        queue.defer(key, key)
    queue.demand(4, 4)
    assert queue.promote(3)
    assert queue.cancel(1)
    assert not queue.cancel(1)
    assert served(queue) == [4, 3, 2]
    queue.defer(5, 5)
    assert queue.clear() == 1
    assert queue.next() is None


def test_promoting_anything_else_changes_nothing():
    queue = TransferQueue()
    queue.prefetch(1, 1)
    assert queue.next() == (1, 1)
    queue.demand(2, 2)
    queue.demand(3, 3)
    assert not queue.promote(1)
    assert not queue.promote(2)
    assert not queue.promote(9)
    assert served(queue) == [2, 3]


def test_only_what_has_not_started_is_cancelled():
    queue = TransferQueue()
    queue.demand(1, 1)
    queue.prefetch(2, 2)
    queue.demand(3, 3)
    queue.next()
    assert not queue.cancel(1)
    assert queue.cancel(2)
    assert queue.cancel(3)
    assert not queue.cancel(2)
    assert queue.next() is None


def test_slot_zero_is_a_slot():
    queue = TransferQueue()
    queue.prefetch(1, 0)
    assert queue.promote(1)
    assert queue.cancel(1)
    queue.prefetch(1, 0)
    assert queue.cancel(1)


@pytest.mark.parametrize("state", ["demand", "prefetch", "running"])
def test_a_key_in_flight_cannot_be_requested_again(state):
    queue = TransferQueue()
    (queue.prefetch if state == "prefetch" else queue.demand)(1, 1)
    if state == "running":
        queue.next()
    for request in (queue.demand, queue.prefetch):
        with pytest.raises(AssertionError, match=r"key 1 .* in flight"):
            request(1, 2)
    queue.cancel(1)
    if state == "running":
        queue.finished(1)
    queue.demand(1, 2)


def test_clear_drops_what_has_not_started():
    queue = TransferQueue()
    queue.demand(1, 1)
    queue.next()
    queue.demand(2, 2)
    queue.prefetch(3, 3)
    assert queue.clear() == 2
    assert len(queue) == 0
    assert queue.next() is None
    queue.finished(1)


class QueueMachine(RuleBasedStateMachine):
    """Against two plain lists."""

    def __init__(self):
        super().__init__()
        self.queue = TransferQueue()
        self.demands, self.prefetches, self.running = [], [], []

    keys = st.integers(0, 6)

    def known(self, key):
        return key in self.demands + self.prefetches + self.running

    @rule(key=keys)
    def demand(self, key):
        if not self.known(key):
            self.queue.demand(key, -key)
            self.demands.append(key)

    @rule(key=keys)
    def prefetch(self, key):
        if not self.known(key):
            self.queue.prefetch(key, -key)
            self.prefetches.append(key)

    @rule(key=keys)
    def promote(self, key):
        assert self.queue.promote(key) == (key in self.prefetches)
        if key in self.prefetches:
            self.prefetches.remove(key)
            self.demands.append(key)

    @rule(key=keys)
    def cancel(self, key):
        queued = next((keys for keys in (self.demands, self.prefetches) if key in keys), None)
        assert self.queue.cancel(key) == (queued is not None)
        if queued is not None:
            queued.remove(key)

    @rule()
    def next(self):
        first = self.demands or self.prefetches
        expected = first.pop(0) if first else None
        assert self.queue.next() == (None if expected is None else (expected, -expected))
        if expected is not None:
            self.running.append(expected)

    @rule()
    def finish(self):
        if self.running:
            self.queue.finished(self.running.pop())

    @invariant()
    def same_length(self):
        assert len(self.queue) == len(self.demands) + len(self.prefetches)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
