"""The pool: each verb moves the residency, the readers, the counts and the observers together."""

import threading
from typing import Any

import pytest
import torch

from foreroute.engine.interfaces import StepInfo, StepObserver
from foreroute.engine.moe_step import ExpertStream
from foreroute.engine.pool import ExpertPool
from foreroute.residency.slots import FREE, LOADING, PINNED
from foreroute.types import ExpertId, ExpertKeys
from tests.support.pools import DECODE, NBYTES, PROMPT, WEIGHTS, Notes, compute, counts, made_pool


def test_a_demand_is_pinned_loaded_counted_and_told() -> None:
    pool, transfer, notes = made_pool()
    compute(pool, 1, [8, 9])
    pool.prefetch(1, [3])
    transfer.begin()
    ready, waiting = pool.demand(1, [8, 11, 12])
    assert ready == [(8, pool.residency.slot_of(8))]
    assert waiting == {11: pool.residency.slot_of(11), 12: pool.residency.slot_of(12)}
    assert transfer.calls[-2:] == [("promote", 11), ("demand", 12, waiting[12])]
    assert notes.of("looked_up") == [([], [], [8, 9]), ([8], [11], [12])]
    assert counts(pool, "hits", "late_hits", "misses", "demand_loads", "demand_bytes") == (1, 1, 3, 3, 3 * NBYTES)
    assert counts(pool, "layers", "stalled_layers", "first_waited") == (2, 2, 0)
    assert counts(pool, "prefetch_loads", "prefetch_bytes") == (1, NBYTES)


def test_what_arrives_is_pinned_and_waited_for_no_more() -> None:
    pool, transfer, notes = made_pool(waits=False)
    _, waiting = pool.demand(0, [1, 2])
    slot = waiting[2]
    transfer.finish(2)
    assert pool.wait(waiting) == [(2, slot)]
    assert list(waiting) == [1]
    assert [pool.residency.state(key) for key in (1, 2)] == [LOADING, PINNED]
    assert counts(pool, "first_waited") == (2,)
    assert pool.phase.stall_s == 1.0
    assert notes.of("stalled") == [(0.0, 1.0)]


def test_nothing_is_counted_as_a_decoded_layer_in_a_prompt() -> None:
    pool, _, _ = made_pool()
    pool.begin_step(PROMPT)
    compute(pool, 0, [1, 2])
    assert counts(pool, "steps", "tokens", "misses", "layers", "stalled_layers", "first_waited") == (1, 5, 2, 0, 0, 0)
    assert (pool.stats.decode.steps, pool.stats.decode.misses) == (1, 0)


def test_padding_is_no_token() -> None:
    pool, _, _ = made_pool()
    padding = torch.tensor([True, True, False, False, False, False])
    pool.begin_step(StepInfo("prefill", 2, 3, padding=padding))
    assert counts(pool, "tokens") == (4,)


def test_a_failed_prefetch_is_forgotten_and_a_failed_demand_raised() -> None:
    pool, transfer, _ = made_pool(waits=False)
    pool.prefetch(1, [0])
    transfer.fail(8, OSError("gone"))
    pool.settle()
    assert pool.residency.state(8) == FREE
    _, waiting = pool.demand(1, [8, 9])
    transfer.finish(9)
    transfer.fail(8, OSError("gone again"))
    with pytest.raises(OSError, match="gone again"):
        pool.wait(waiting)
    assert pool.phase.stall_s == 1.0, "the wait is counted all the same"


def test_mispredicted_prefetches_are_withdrawn_if_no_reader_has_begun() -> None:
    pool, transfer, notes = made_pool()
    pool.prefetch(1, [0, 1, 2])
    assert transfer.begin() == 8
    pool.cancel_mispredicted(1, [10])
    assert [pool.residency.state(key) for key in (8, 9, 10)] == [LOADING, FREE, LOADING]
    assert counts(pool, "prefetch_loads", "prefetch_bytes", "prefetch_cancelled") == (2, 2 * NBYTES, 1)
    pool.cancel_mispredicted(1, [])
    assert counts(pool, "prefetch_cancelled") == (1,), "what was confirmed or begun is asked for once"
    assert notes.of("guessed") == [(1, [0, 1, 2])]


def test_a_layer_that_is_resident_needs_no_guess() -> None:
    pool, _, _ = made_pool()
    assert pool.can_prefetch(1)
    compute(pool, 1, list(range(8, 16)))
    assert not pool.can_prefetch(1)


def deferred(transfer: Any) -> list[int]:
    return [call[1] for call in transfer.calls if call[0] == "defer"]


def arrive(pool: ExpertPool, transfer: Any, key: int) -> None:
    transfer.finish(key)
    pool.settle()


def test_the_second_time_and_then_again_the_second_time() -> None:
    pool, transfer, notes = made_pool()
    pool.defer([9])
    assert deferred(transfer) == []
    pool.defer([9])
    assert deferred(transfer) == [9]
    assert counts(pool, "deferred_loads", "deferred_bytes") == (1, NBYTES)
    assert notes.of("deferred") == [([9],)]
    arrive(pool, transfer, 9)
    pool.residency.drop([9])
    pool.defer([9])
    assert deferred(transfer) == [9], "once it was read, it counts anew"
    pool.defer([9])
    assert deferred(transfer) == [9, 9]


def test_what_has_no_room_keeps_its_turn() -> None:
    pool, transfer, _ = made_pool(deferred_slots=1)
    pool.defer([9, 10])
    pool.defer([9, 10])
    assert deferred(transfer) == [9]
    arrive(pool, transfer, 9)
    pool.defer([10])
    assert deferred(transfer) == [9, 10]


def test_a_prompt_takes_back_what_has_not_started() -> None:
    pool, transfer, _ = made_pool()
    pool.defer([9, 10])
    pool.defer([9, 10])
    pool.prefetch(2, [3])
    transfer.begin()  # the guess: it goes on
    pool.cancel_queued()
    assert pool.residency.deferred == set()
    assert transfer.in_flight == [19]
    assert counts(pool, "deferred_loads", "deferred_bytes", "prefetch_loads") == (0, 0, 1)
    pool.defer([9])
    assert deferred(transfer)[-1] == 9, "it keeps its turn"


def test_a_prefetch_in_flight_that_was_deferred_is_cancelled_as_a_prefetch() -> None:
    pool, _, _ = made_pool()
    pool.defer([9])
    pool.prefetch(1, [1])
    pool._unconfirmed[1].clear()  # its layer has passed
    pool.defer([9])
    assert pool.residency.deferred == {9}
    pool.cancel_queued()
    assert counts(pool, "prefetch_loads", "prefetch_bytes", "deferred_loads") == (0, 0, 0)


def test_substituted_experts_are_counted_told_and_deferred() -> None:
    pool, transfer, notes = made_pool()
    pool.substitute([9])
    pool.substitute([9, 10])
    assert counts(pool, "substituted") == (3,)
    assert notes.of("substituted") == [([9],), ([9, 10],)]
    assert deferred(transfer) == [9]


def test_without_a_cache_nothing_stays_and_nothing_is_deferred() -> None:
    pool, transfer, _ = made_pool(keeps=False)
    compute(pool, 1, [8, 9])
    assert pool.residency.num_resident == 0
    pool.substitute([9])
    pool.substitute([9])
    assert deferred(transfer) == []
    pool.prefetch(1, [2])
    arrive(pool, transfer, 10)
    pool.begin_step(DECODE)
    assert pool.residency.num_resident == 0


def test_outcomes_of_prefetches_go_to_the_phase_that_ran() -> None:
    pool, transfer, _ = made_pool()
    pool.prefetch(1, [0])
    arrive(pool, transfer, 8)
    compute(pool, 1, [8])
    pool.begin_step(PROMPT)
    assert (pool.stats.decode.prefetch_used, pool.stats.prefill.prefetch_used) == (1, 0)
    assert pool.snapshot().prefetch_used == 1


def test_a_snapshot_is_a_copy() -> None:
    pool, _, _ = made_pool()
    before = pool.snapshot()
    compute(pool, 0, [1])
    assert before.decode.misses == 0
    assert pool.snapshot().minus(before).decode.misses == 1


# Experts that pass by.


def test_a_stream_reads_each_expert_once_and_gives_every_slot_back() -> None:
    pool, transfer, notes = made_pool(num_slots=7)
    compute(pool, 1, [8, 11])
    pool.begin_step(PROMPT)
    pool.prefetch(2, [5])
    keys = list(range(8, 16))
    stream = ExpertStream(pool, 1, keys)
    slots = []
    for key in keys:
        slots.append(stream.slot_of(key))
        assert stream.slot_of(key) == slots[-1], "a family's own forward asks once for each part"
    stream.close()
    assert transfer.num_in_flight == 0
    assert counts(pool, "hits", "late_hits", "misses", "demand_loads", "prefetch_cancelled") == (2, 0, 6, 6, 1)
    assert notes.of("looked_up")[-1] == ([8, 11], [], [9, 10, 12, 13, 14, 15])
    residency = pool.residency
    assert not any(residency.state(key) in (PINNED, LOADING) for key in range(residency.num_keys))
    assert residency.num_free + residency.num_resident == residency.num_slots
    assert {8, 11} <= set(residency.ready_keys()), "what was resident stays so"


@pytest.mark.parametrize(("num_slots", "wanted", "held"), [(7, 1, 1), (7, 2, 2), (4, 9, 3)])
def test_a_stream_holds_several_slots_while_one_is_left_to_read_into(num_slots: int, wanted: int, held: int) -> None:
    pool, _, _ = made_pool(num_slots=num_slots)
    pool.begin_step(PROMPT)
    keys = list(range(8, 16))
    stream = ExpertStream(pool, 1, keys, wanted)
    assert stream.most_held == held
    asked = list[int]()
    for key in keys:
        asked.append(stream.slot_of(key))
        last = asked[-held:]
        assert len(set(last)) == len(last), "a slot that is held was given to another expert"
        for before, slot in zip(keys[len(asked) - len(last) :], last, strict=False):
            assert stream.slot_of(before) == slot
    stream.close()
    residency = pool.residency
    assert residency.num_free + residency.num_resident == residency.num_slots
    assert not any(residency.state(key) in (PINNED, LOADING) for key in range(residency.num_keys))


def test_all_that_is_resident_may_be_held() -> None:
    pool, _, _ = made_pool(num_slots=12)
    compute(pool, 1, [8, 9, 10])
    pool.begin_step(PROMPT)
    stream = ExpertStream(pool, 1, [8, 9, 10], 5)
    assert stream.most_held == 5
    stream.close()


def test_what_was_being_read_when_a_stream_began_is_a_late_hit() -> None:
    pool, transfer, notes = made_pool()
    pool.begin_step(PROMPT)
    pool.prefetch(1, [0])
    transfer.begin()
    ExpertStream(pool, 1, [8, 9]).close()
    assert notes.of("looked_up") == [([], [8], [9])]
    assert counts(pool, "hits", "late_hits", "misses") == (0, 1, 1)


def test_a_prefetch_that_ends_while_a_stream_waits_is_taken_in() -> None:
    pool, transfer, _ = made_pool(waits=False)
    pool.begin_step(PROMPT)
    stream = ExpertStream(pool, 1, [8])
    pool.prefetch(2, [0])
    transfer.fail(16, OSError("a guess"))
    transfer.finish(8)
    assert stream.slot_of(8) == pool.residency.slot_of(8)
    assert pool.residency.state(16) == FREE


def test_a_read_into_a_borrowed_slot_that_fails_is_raised() -> None:
    pool, transfer, _ = made_pool(num_slots=5, waits=False)
    pool.begin_step(PROMPT)
    stream = ExpertStream(pool, 1, list(range(8, 16)))
    borrowed = next(key for key in transfer.in_flight if pool.residency.state(key) == FREE)
    transfer.fail(borrowed, OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        stream.slot_of(borrowed)


# Observers come and go.


def test_observers_come_and_go_where_a_step_begins() -> None:
    pool, _, first = made_pool()
    second = Notes()
    pool.add_observer(second)
    pool.add_observer(second)
    pool.begin_layer(0, [[1]], WEIGHTS)
    assert second.told == []
    pool.begin_step(DECODE)
    pool.begin_layer(0, [[1]], WEIGHTS)
    pool.remove_observer(first)
    pool.end_layer()
    assert [name for name, _ in second.told] == ["begin_step", "begin_layer", "end_layer"]
    assert [name for name, _ in first.told] == ["begin_step", "begin_layer", "begin_step", "begin_layer", "end_layer"]
    pool.begin_step(DECODE)
    assert pool.observers == (second,)
    pool.remove_observer(first)
    pool.close()
    assert second.told[-1][0] == "end"
    assert first.told[-1][0] == "end_layer"


def test_observers_come_and_go_from_many_threads() -> None:
    pool, _, notes = made_pool()
    observers = [Notes() for _ in range(8)]

    def churn(observer: Notes) -> None:
        for _ in range(200):
            pool.add_observer(observer)
            pool.remove_observer(observer)
        pool.add_observer(observer)

    threads = [threading.Thread(target=churn, args=(observer,)) for observer in observers]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        pool.begin_step(DECODE)
        for observer in pool.observers:
            assert observer.told[-1][0] == "begin_step"
    for thread in threads:
        thread.join()
    pool.begin_step(DECODE)
    assert set(pool.observers) == {notes, *observers}


def test_every_observer_hears_the_end_though_one_fails() -> None:
    pool, _, notes = made_pool()

    class Failing(StepObserver):
        def end(self, stats: Any) -> None:
            raise OSError("the disk is full")

    pool.add_observer(Failing())
    last = Notes()
    pool.add_observer(last)
    with pytest.raises(OSError, match="full"):
        pool.close()
    assert [one.told[-1][0] for one in (notes, last)] == ["end", "end"]
    pool.close()


def test_the_arithmetic_of_keys() -> None:
    keys = ExpertKeys.of([2, 4, 3])
    assert (keys.per_layer, keys.num_keys) == (4, 12)
    assert keys.all() == [0, 1, 4, 5, 6, 7, 8, 9, 10]
    assert keys.keys_of(2, [[0, 3, 2], [-1, 7, 1]]) == [[8, -1, 10], [-1, -1, 9]]
    assert keys.experts_of(2, [8, -1, 10]) == [0, -1, 2]
    assert [keys.expert_id(key).layer for key in (3, 4, 11)] == [0, 1, 2]
    assert keys.expert_id(keys.key(1, 3)) == ExpertId(1, 3)
