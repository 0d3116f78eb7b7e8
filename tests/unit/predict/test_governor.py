"""The governor on made-up clocks: what it chooses, what trying costs, and when it tries again."""

import itertools
import random
from collections.abc import Callable

import pytest

from foreroute.predict.governor import FULL, HALF, OFF, Governor

Cost = Callable[[float, int], float]


def run(governor: Governor, cost: Cost, steps: int, waited: float = 0.3, first: int = 0) -> tuple[list[float], float]:
    """The share of each step, and the seconds of all; a step waits for `waited` of its time."""
    shares, total = [], 0.0
    for step in range(first, first + steps):
        shares.append(governor.share)
        seconds = cost(governor.share, step)
        total += seconds
        governor.step(seconds, waited * seconds)
    return shares, total


def noisy(costs: dict[float, float], spread: float = 0.1, seed: int = 0) -> Cost:
    """Steps that take this many seconds by share, more or less, and one in twenty thrice as long."""
    rng = random.Random(seed)

    def cost(share: float, step: int) -> float:
        slow = 3.0 if rng.random() < 0.05 else 1.0
        return costs[share] * slow * max(0.1, rng.gauss(1.0, spread))

    return cost


@pytest.mark.parametrize("best", [FULL, HALF, OFF])
def test_the_quickest_is_chosen_and_kept(best: float) -> None:
    for seed in range(20):
        governor = Governor()
        costs = {share: 1.0 if share == best else 1.15 for share in (FULL, HALF, OFF)}
        shares, _ = run(governor, noisy(costs, seed=seed), 1500)
        assert shares[-400:].count(best) > 300, f"seed {seed}: {governor.why}"


def test_trying_costs_little_where_guesses_cost_a_tenth() -> None:
    for seed in range(10):
        costs = {FULL: 1.1, HALF: 1.07, OFF: 1.0}
        governor = Governor()
        run(governor, noisy(costs, seed=seed), 200)
        _, governed = run(governor, noisy(costs, seed=seed + 100), 1000)
        _, off = run(_Always(OFF), noisy(costs, seed=seed + 100), 1000)
        assert governed < 1.02 * off


class _Always(Governor):
    """One share for ever."""

    def __init__(self, share: float) -> None:
        super().__init__((share,))
        self.share = share

    def step(self, seconds: float, waited_s: float) -> bool:
        return False


def test_among_equals_the_narrowest_is_chosen_and_the_choice_stays() -> None:
    governor = Governor()
    shares, _ = run(governor, lambda share, step: 1.0, 3000)
    assert governor.share == OFF
    assert governor.changes == 1
    assert shares.count(OFF) > 0.9 * len(shares)


def test_a_cache_that_warms_up_favours_no_share() -> None:
    """Steps get quicker all the time: whoever is tried last would win, if trials did not run there and back."""
    governor = Governor()
    run(governor, lambda share, step: {FULL: 0.85, HALF: 1.0, OFF: 1.0}[share] * (2.0 - min(step, 400) / 400), 500)
    assert governor.share == FULL


def test_without_waiting_there_is_nothing_to_gain() -> None:
    governor = Governor()
    shares, _ = run(governor, lambda share, step: 1.0 + 0.01 * share, 60, waited=0.001)
    assert governor.share == OFF
    assert shares.count(FULL) + shares.count(HALF) <= 16
    assert "nothing waits" in governor.why


def test_it_tries_again_when_steps_take_another_time() -> None:
    governor = Governor()
    run(governor, lambda share, step: {FULL: 1.2, HALF: 1.1, OFF: 1.0}[share], 300)
    assert governor.share == OFF
    shares, _ = run(governor, lambda share, step: {FULL: 2.0, HALF: 2.2, OFF: 2.6}[share], 300)
    assert governor.share == FULL
    assert governor.changes == 2
    assert FULL in shares[:160]


def test_a_confirmed_choice_is_tried_ever_more_rarely() -> None:
    governor = Governor()
    shares, _ = run(governor, lambda share, step: {FULL: 1.0, HALF: 1.1, OFF: 1.2}[share], 12_000)
    others = [step for step, share in enumerate(shares) if share != FULL]
    gaps = [later - earlier for earlier, later in itertools.pairwise(others) if later - earlier > 100]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 8 * gaps[0]


def test_answers_shorter_than_a_trial_come_to_a_decision_too() -> None:
    governor = Governor()
    for _ in range(60):
        for step in range(5):
            # The step after a prompt, which is slow, says nothing.
            governor.step(9.0 if step == 0 else {FULL: 1.0, HALF: 1.3, OFF: 2.0}[governor.share], 0.3)
        governor.pause()
    assert governor.share == FULL
    assert not governor.is_trying
    assert "100% width 1000.00" in governor.why


def test_trusted_guesses_are_not_tried_in_a_short_answer_but_in_a_long_one() -> None:
    governor = Governor(trusted_steps=100)
    shares, _ = run(governor, lambda share, step: {FULL: 1.2, HALF: 1.1, OFF: 1.0}[share], 100)
    assert set(shares) == {FULL}
    run(governor, lambda share, step: {FULL: 1.2, HALF: 1.1, OFF: 1.0}[share], 150)
    assert governor.share == OFF


def test_a_decision_for_what_is_being_tried_is_told_too() -> None:
    governor, told = Governor(), []
    for _ in range(300):
        has_changed = governor.step({FULL: 1.0, HALF: 1.3, OFF: 2.0}[governor.share], 0.3)
        told += [(governor.share, governor.is_trying)] * has_changed
    assert (FULL, False) in told
    assert governor.chosen == FULL
