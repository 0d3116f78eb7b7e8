"""The length of a draft, from times that are passed in."""

import random

import pytest

from foreroute.drafting.governor import DraftGovernor

PLAIN_S = 0.010


def run(governor: DraftGovernor, tokens: int, acceptance: float, step_s: float, token_s: float, seed: int = 0) -> float:
    """Seconds for some tokens: a plain step takes PLAIN_S, one with a draft step_s + token_s for each drafted."""
    chance, seconds, made = random.Random(seed), 0.0, 0
    governor.begin()
    while made < tokens:
        drafted = governor.length
        accepted = 0
        while accepted < drafted and chance.random() < acceptance:
            accepted += 1
        took = (step_s + token_s * drafted if drafted else PLAIN_S) * chance.uniform(0.95, 1.05)
        governor.step(drafted, accepted, took)
        seconds += took
        made += accepted + 1
    return seconds


def test_a_draft_that_pays_is_used() -> None:
    """At 80 % acceptance and cheap verification several tokens at a time; a third of the time is gained at least."""
    governor = DraftGovernor()
    took = run(governor, 1000, 0.8, 1.2 * PLAIN_S, 0.15 * PLAIN_S)
    assert governor.chosen >= 3
    assert took < 0.67 * 1000 * PLAIN_S
    assert governor.acceptance == pytest.approx(0.8, abs=0.12)
    assert governor.plain_s == pytest.approx(PLAIN_S, rel=0.05)


@pytest.mark.parametrize(
    ("acceptance", "step", "token"),
    [(0.0, 1.3, 0.2), (0.2, 1.5, 0.3), (0.5, 2.0, 0.5), (0.9, 3.0, 2.0), (0.3, 1.0, 1.0)],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_draft_that_does_not_pay_costs_no_more_than_a_share(acceptance, step, token, seed) -> None:
    """Never slower than without one by more than 2 %, trials included."""
    governor = DraftGovernor()
    took = run(governor, 2000, acceptance, step * PLAIN_S, token * PLAIN_S, seed)
    assert governor.chosen == 0
    assert took < 1.02 * 2000 * PLAIN_S


def test_it_finds_out_when_the_text_changes() -> None:
    """From a text that cannot be foreseen to one that can, and back."""
    governor = DraftGovernor()
    costs = (1.3 * PLAIN_S, 0.15 * PLAIN_S)
    run(governor, 500, 0.1, *costs)
    assert governor.chosen == 0
    run(governor, 1000, 0.9, *costs)
    assert governor.chosen >= 3
    took = run(governor, 1000, 0.1, *costs)
    assert governor.chosen == 0
    # What was gained before may be lost again, as far as it counts.
    assert took < 1.05 * 1000 * PLAIN_S


def test_the_length_follows_what_is_accepted() -> None:
    chosen = []
    for acceptance in (0.5, 0.95):
        governor = DraftGovernor()
        run(governor, 2000, acceptance, 1.1 * PLAIN_S, 0.2 * PLAIN_S)
        chosen.append(governor.chosen)
    assert 0 < chosen[0] < chosen[1]


def test_of_lengths_that_take_the_same_time_the_shortest_is_chosen() -> None:
    """It computes and reads least."""
    governor = DraftGovernor()
    for _ in range(40):
        # The first token is always accepted, a later one never; drafting more costs nothing.
        drafted = governor.length
        governor.step(drafted, min(drafted, 1), PLAIN_S * (1.2 if drafted else 1.0))
    assert 1 <= governor.chosen <= 4


def test_one_slow_step_decides_nothing() -> None:
    governor = DraftGovernor()
    run(governor, 500, 0.8, 1.2 * PLAIN_S, 0.15 * PLAIN_S)
    before = governor.chosen
    governor.step(governor.length, 1, 100 * PLAIN_S)
    assert abs(governor.chosen - before) <= 1


def test_a_drafter_without_a_proposal_makes_plain_steps() -> None:
    """What it could have drafted and did not is expected of it again."""
    governor = DraftGovernor()
    for _ in range(200):
        governor.step(0, 0, PLAIN_S)
    assert governor.length > 0
    assert governor.drafted == governor.drafted_steps == 0
    assert governor.seconds_per_token(3) == pytest.approx(PLAIN_S, rel=0.01)


def test_asking_for_drafts_that_are_not_made_is_counted() -> None:
    """A small model that is never sure takes time all the same: it is asked rarely."""
    governor, seconds = DraftGovernor(), 0.0
    governor.begin()
    for _ in range(2000):
        took = 1.4 * PLAIN_S if governor.length else PLAIN_S
        governor.step(0, 0, took)
        seconds += took
    assert governor.plain_s == pytest.approx(PLAIN_S)
    assert seconds < 1.02 * 2000 * PLAIN_S


def test_rows_that_share_a_step_are_measured_as_rows() -> None:
    """Four rows, of which each draft is accepted whole or not at all: half of what is tried, and tokens of each row."""
    shared, rows = DraftGovernor(), [(3, 3), (3, 0), (2, 2), (2, 0)]
    for _ in range(4):
        shared.step_rows([(0, 0)] * 4, 4 * PLAIN_S)
    for _ in range(200):
        shared.step_rows(rows, 5 * PLAIN_S, limit=3)
    assert (shared.drafted, shared.accepted) == (200 * 10, 200 * 5)
    # Behind a token that was not accepted nothing was tried.
    assert shared.acceptance == pytest.approx(5 / 7, abs=0.01)
    # 2.25 tokens of each row in 5 times a plain step's time for one of each is no gain of 4 / 5.
    assert shared.seconds_per_token(3) == pytest.approx(
        5 * PLAIN_S / (1 + 5 / 7 + (5 / 7) ** 2 + 0.5 * (5 / 7) ** 3), rel=0.05
    )


def test_one_row_of_a_batch_is_as_a_row_alone() -> None:
    alone, shared = DraftGovernor(), DraftGovernor()
    chance = random.Random(3)
    for _ in range(300):
        assert shared.length == alone.length
        accepted = chance.randint(0, alone.length)
        took = PLAIN_S * (1 + 0.1 * alone.length)
        shared.step_rows([(alone.length, accepted)] * 3, took)
        alone.step(alone.length, accepted, took)
    assert shared.chosen == alone.chosen > 0
    assert shared.acceptance == pytest.approx(alone.acceptance)
