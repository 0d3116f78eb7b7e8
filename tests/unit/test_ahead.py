"""Reads that nobody waits for: an expert is filled the second time it is stood in for, and keeps its turn till then."""

from types import SimpleNamespace
from typing import Any

from foreroute.engine.ahead import ReadsAhead
from foreroute.engine.stats import PhaseStats
from foreroute.residency import Lru, Residency
from foreroute.transfer.fake import FakeTransfer


def made(filling_slots: int = 2) -> tuple[ReadsAhead, Any, PhaseStats]:
    layers = [SimpleNamespace(num_experts=8, layout=SimpleNamespace(nbytes=100))] * 3
    table = SimpleNamespace(num_experts=8, layers=layers, expert_id=lambda key: SimpleNamespace(layer=key // 8))
    pool = Residency(12, 24, eviction=Lru(), staging_slots=4, filling_slots=filling_slots, keys_per_layer=8)
    runtime: Any = SimpleNamespace(table=table, residency=pool, transfer=FakeTransfer(), tracing=None)
    return ReadsAhead(runtime), runtime, PhaseStats()


def filled(runtime: Any) -> list[int]:
    return [call[1] for call in runtime.transfer.calls if call[0] == "fill"]


def arrive(runtime: Any, key: int) -> None:
    runtime.transfer.finish(key)
    for completion in runtime.transfer.completed():
        runtime.residency.loaded(completion.key)


def test_the_second_time_and_then_again_the_second_time() -> None:
    ahead, runtime, phase = made()
    ahead.fill(1, [9], phase)
    assert filled(runtime) == []
    ahead.fill(1, [9], phase)
    assert filled(runtime) == [9]
    assert (phase.fill_loads, phase.fill_bytes) == (1, 100)
    arrive(runtime, 9)
    runtime.residency.drop([9])
    ahead.fill(1, [9], phase)
    assert filled(runtime) == [9], "once it was filled, it counts anew"
    ahead.fill(1, [9], phase)
    assert filled(runtime) == [9, 9]


def test_what_has_no_room_keeps_its_turn() -> None:
    ahead, runtime, phase = made(filling_slots=1)
    ahead.fill(1, [9, 10], phase)
    ahead.fill(1, [9, 10], phase)
    assert filled(runtime) == [9]
    arrive(runtime, 9)
    ahead.fill(1, [10], phase)
    assert filled(runtime) == [9, 10]


def test_a_prompt_takes_back_what_has_not_started() -> None:
    ahead, runtime, phase = made()
    ahead.fill(1, [9, 10], phase)
    ahead.fill(1, [9, 10], phase)
    ahead.prefetch(2, [3], phase)
    runtime.transfer.begin()  # the guess: it goes on
    ahead.drop_all(phase)
    assert runtime.residency.filling == set()
    assert runtime.transfer.in_flight == [19]
    assert (phase.fill_loads, phase.fill_bytes, phase.prefetch_loads) == (0, 0, 1)
    ahead.fill(1, [9], phase)
    assert filled(runtime)[-1] == 9, "it keeps its turn"
