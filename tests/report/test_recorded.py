"""What the recorded run did: counts, bytes, times, and what became of every guess."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from foreroute.errors import BudgetError, TraceError
from foreroute.report.guesses import fates_of, layers_of
from foreroute.report.replay import make_report
from foreroute.report.route import route_of
from foreroute.report.timeline import token_picture, typical_token
from foreroute.report.timing import durations, recorded_of, timing_of
from foreroute.report.trace_file import read_recording
from tests.report.traces import end, gone, guess, header, layer, load, routed, stall, step, write

# Two texts: a prompt and three tokens, a prompt and one token.
RUN = (
    header(),
    step(0.0, "prefill", positions=3, is_start=True),
    load(0, 0, 0.0, 0.1, "prefetch"),
    layer(0.0, 0.1, 0, misses=[0, 1]),
    layer(0.1, 0.2, 1, misses=[0, 1]),
    step(1.0),
    guess(1.0, 0, [2, 3]),
    load(0, 2, 1.0, 1.01, "prefetch"),  # in time
    load(0, 3, 1.0, 1.04, "prefetch"),  # the guess was wrong; the second token wants it
    layer(1.02, 1.05, 0, hits=[0, 2]),
    guess(1.05, 1, [2, 3]),
    gone("cancel", 1.06, 1, 1),
    stall(1.06, 1.08, 1),
    load(1, 2, 1.05, 1.08, "prefetch"),  # late
    load(1, 3, 1.06, 1.10, "prefetch"),  # never wanted
    load(1, 0, 1.06, 1.08),
    layer(1.05, 1.10, 1, late_hits=[2], misses=[0]),
    step(1.2),
    layer(1.2, 1.25, 0, hits=[0, 3]),
    gone("evict", 1.26, 1, 3),
    load(1, 1, 1.26, 1.30, "deferred"),
    layer(1.25, 1.3, 1, hits=[2], substituted=[1]),
    step(1.5),
    layer(1.5, 1.55, 0, hits=[0, 3]),
    guess(1.55, 1, [3, 1]),
    load(1, 3, 1.55, 1.6, "prefetch"),  # undecided at the end
    layer(1.55, 1.6, 1, hits=[1, 2]),
    step(5.0, "prefill", positions=2, is_start=True),
    layer(5.0, 5.1, 0, hits=[0, 3]),
    layer(5.1, 5.2, 1, hits=[1, 2]),
    step(6.0),
    layer(6.0, 6.05, 0, hits=[0, 3]),
    layer(6.05, 6.1, 1, hits=[1, 2]),
    end(),
)


@pytest.fixture
def recording(tmp_path: Path):
    return read_recording(write(tmp_path / "run.jsonl", *RUN))


def test_a_step_lasts_until_the_next_of_its_text(recording) -> None:
    # The third of the first text, and the only one of the second, end with their last layer.
    assert durations(recording) == pytest.approx([0.2, 0.3, 0.1, 0.1])


def test_counts_and_bytes_are_those_of_decode_after_the_warm_up(recording) -> None:
    did = recorded_of(recording, 0)
    assert (did.hits, did.late_hits, did.misses, did.substituted, did.tokens) == (13, 1, 1, 1, 4)
    assert did.demanded == 16
    # Prefill's load is not decode's.
    assert (did.demand_bytes, did.prefetch_bytes, did.deferred_bytes) == (250, 1250, 250)
    later = recorded_of(recording, 1)
    assert (later.hits, later.late_hits, later.misses, later.substituted, later.tokens) == (11, 0, 0, 1, 3)
    assert later.bytes_per_token == pytest.approx(2000 / 3)


def test_times_are_means_and_the_bandwidth_is_that_of_the_reads(recording) -> None:
    timing = timing_of(recording, 0)
    assert timing.step_ms == pytest.approx(175)
    assert timing.stall_ms == pytest.approx(5)
    assert timing.compute_ms == pytest.approx(170)
    assert timing.bytes_per_s == pytest.approx(7000 / (0.01 + 0.04 + 0.03 + 0.04 + 0.02 + 0.04 + 0.05))
    assert not timing.is_bandwidth_given
    assert timing_of(recording, 0, 1e6).bytes_per_s == 1e6


def test_every_guessed_read_has_one_fate(recording) -> None:
    fates = fates_of(recording)
    assert (fates.in_time, fates.late_hits, fates.later, fates.wasted, fates.open) == (1, 1, 1, 1, 1)
    assert fates.cancelled == 1
    assert fates.loads == 5


def test_recall_is_of_the_guessed_steps(recording) -> None:
    first, second = layers_of(recording)
    assert (first.guessed, first.recall, first.found, first.width) == (1, 0.5, 1.0, 2.0)
    # [2, 3] of 2, 0 and [3, 1] of 1, 2: two of four, one of which was there.
    assert (second.guessed, second.recall, second.found) == (2, 0.5, 0.5)
    assert first.uses == (4, 0, 1, 3)
    assert second.uses == (1, 3, 4, 0)
    assert second.hits == (0, 2, 3, 0)


def test_a_token_is_drawn_with_what_each_read_was_for(recording) -> None:
    picture = token_picture(recording, 0)
    assert picture.duration_ms == pytest.approx(200)
    assert picture.stall_ms == pytest.approx(20)
    kinds = {(load.layer, load.expert): kind for _, _, _, kind, load in picture.reads}
    assert kinds == {(0, 2): "in_time", (0, 3): "later", (1, 2): "late_hit", (1, 3): "wasted", (1, 0): "demand"}
    for lane in {read[2] for read in picture.reads}:
        spans = sorted(read[:2] for read in picture.reads if read[2] == lane)
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert typical_token(recording) in (2, 3)


def test_tpot_bounds_follow_from_compute_and_reads(tmp_path: Path) -> None:
    # 10 ms a token, of which 2 wait; at 1 MB/s each kB missed takes a ms.
    recording = read_recording(routed(tmp_path / "run.jsonl", [[[0, 1], [0, 1]], [[2, 3], [2, 3]]] * 10))
    report = make_report(recording, memories=["100%"], warm_up=2, bytes_per_s=1e6)
    pools = {budget.num_slots: budget for budget in report.budgets}
    assert set(pools) == {5, 8}
    assert pools[5].is_recorded
    lru = pools[5].outcomes["lru"]
    assert lru.misses_per_token == 4
    low, high = report.timing.tpot_ms(lru)
    compute = report.timing.compute_ms
    assert compute == pytest.approx(report.timing.step_ms - 2)
    assert (low, high) == pytest.approx((compute, compute + 4))
    slow = timing_of(recording, 2, 1e5)
    assert slow.tpot_ms(lru) == pytest.approx((40, compute + 40))
    assert pools[8].outcomes["lru"].misses == 0
    assert report.timing.tpot_ms(pools[8].outcomes["lru"]) == pytest.approx((compute, compute))
    assert report.recorded_budget.over_belady(4000) == pytest.approx(4000 / pools[5].outcomes["belady"].bytes_per_token)
    assert pools[8].over_belady(0) is None


def test_the_curve_leaves_out_what_is_below_a_token(tmp_path: Path) -> None:
    recording = read_recording(routed(tmp_path / "run.jsonl", [[[0, 1], [0, 1]]] * 10))
    report = make_report(recording)
    assert report.left_out == ("12.5%", "25%", "37.5%")
    assert [budget.num_slots for budget in report.budgets] == [4, 5, 6, 8]


def test_where_nothing_was_read_the_speed_has_to_be_given(tmp_path: Path) -> None:
    run = [header(num_slots=8)]
    for number in range(5):
        run += [step(number), layer(number, number + 0.1, 0, hits=[0, 1])]
        run += [layer(number + 0.1, number + 0.2, 1, hits=[0])]
    recording = read_recording(write(tmp_path / "run.jsonl", *run, end()))
    report = make_report(recording, warm_up=0)
    assert report.timing.bytes_per_s is None
    assert report.timing.tpot_ms(report.budgets[0].outcomes["lru"]) is None
    assert make_report(recording, warm_up=0, bytes_per_s=1e9).timing.tpot_ms(report.budgets[0].outcomes["lru"])


def test_traces_that_cannot_be_replayed(tmp_path: Path) -> None:
    prompt_alone = read_recording(write(tmp_path / "run.jsonl", *RUN[:5], end()))
    with pytest.raises(TraceError, match=r"no whole decode step.*--max-new-tokens"):
        route_of(prompt_alone)
    whole = read_recording(write(tmp_path / "run.jsonl", *RUN))
    with pytest.raises(TraceError, match="4 decode steps; a warm-up of 4 leaves none"):
        route_of(whole, 4)
    assert route_of(whole).warm_up == 0
    assert route_of(whole, 3).counted_tokens == 1


def test_steps_that_passed_through_the_pool_are_refused(tmp_path: Path) -> None:
    recording = read_recording(routed(tmp_path / "run.jsonl", [[[0, 1, 2, 3], [0, 1]]] * 10, num_slots=3))
    with pytest.raises(TraceError, match="demanded 4 experts at once, more than the 3 slots"):
        make_report(recording)


MIXED = {"expert_bytes": [1000, 2000], "slot_bytes": 2048, "layer_slot_bytes": [1024, 2048], "class_slots": [2, 3]}


def test_slots_of_each_length_are_replayed_as_pools_of_their_own(tmp_path: Path) -> None:
    """Layer 0 goes round its four experts in three slots, layer 1 has two experts in two slots."""
    steps = [[[at % 4, (at + 1) % 4], [0, 1]] for at in range(20)]
    report = make_report(read_recording(routed(tmp_path / "run.jsonl", steps, num_slots=5, **MIXED)), warm_up=4)
    recorded = report.recorded_budget
    assert (recorded.num_slots, recorded.pool_bytes) == (5, 2 * 2048 + 3 * 1024)
    lru = recorded.outcomes["lru"]
    assert (lru.misses, lru.miss_bytes) == (16, 16 * 1000), "one new expert of layer 0 a step, of layer 1 none"
    assert lru.hits == 16 * 3
    assert recorded.outcomes["belady"].misses <= lru.misses
    assert [(one.num_slots, one.pool_bytes) for one in report.budgets if not one.is_recorded] == [
        (4, 2 * 2048 + 2 * 1024), (6, 3 * 2048 + 3 * 1024), (8, 4 * 2048 + 4 * 1024),
    ]  # fmt: skip
    whole = make_report(read_recording(routed(tmp_path / "run.jsonl", steps, num_slots=5, **MIXED)), memories=["6KiB"])
    assert {one.pool_bytes for one in whole.budgets} == {2 * 2048 + 2 * 1024, recorded.pool_bytes}


def test_a_layer_that_wants_more_than_its_lengths_slots(tmp_path: Path) -> None:
    steps = [[[0, 1], [0, 1, 2]]] * 10
    with pytest.raises(TraceError, match="demanded 3 experts at once, more than the 2 slots"):
        make_report(read_recording(routed(tmp_path / "run.jsonl", steps, num_slots=5, **MIXED)))
    recording = read_recording(routed(tmp_path / "run.jsonl", steps, num_slots=6, **MIXED | {"class_slots": [3, 3]}))
    with pytest.raises(BudgetError, match=r"holds 2 slots; .* needs 3\. Raise --memory to 9\.0 KiB"):
        make_report(recording, memories=["50%"])
    assert make_report(recording, memories=["9KiB"]).budgets


@pytest.mark.parametrize(
    "changes",
    [{"layer_slot_bytes": [1024, 1024]}, {"layer_slot_bytes": [2048, 1024]}, {"class_slots": [5]},
     {"class_slots": [2, 2]}, {"class_slots": [5, 0]}],
)  # fmt: skip
def test_a_header_whose_pool_makes_no_sense(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(TraceError, match="line 1 describes no pool"):
        read_recording(write(tmp_path / "run.jsonl", header(num_slots=5, **MIXED | changes)))
