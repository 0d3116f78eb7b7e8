"""Recall by slot, by exact set and by gate mass, counted by hand; and what controls must read."""

import pytest
import torch

from foreroute.predict.base import RouterSample, TokenGuess
from foreroute.prepare.controls import Moment, Popularity, previous_token, shuffled, uniform
from foreroute.prepare.fit import choose
from foreroute.prepare.scoring import LayerTallies, LayerTally

EXPERTS = 16


def guess_of(rows: list[list[int]]) -> TokenGuess:
    return TokenGuess(torch.tensor(rows), torch.zeros(len(rows), len(rows[0])))


def truth_of(rows: list[list[int]], weights: list[list[float]] | None = None) -> RouterSample:
    as_weights = torch.tensor(weights) if weights else torch.full((len(rows), len(rows[0])), 1 / len(rows[0]))
    return RouterSample(torch.zeros(len(rows), 3), torch.tensor(rows), as_weights)


def moment_of(truth: RouterSample, context: int, layer: int = 1) -> Moment:
    return Moment(layer, EXPERTS, truth, truth, torch.zeros(len(truth.ids), dtype=torch.int64), context, 0)


def random_truth(tokens: int, top_k: int = 4) -> RouterSample:
    scores = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(7))
    return truth_of(scores.topk(top_k).indices.tolist())


def test_each_recall_counted_by_hand() -> None:
    tally = LayerTally()
    # k = 2: widths 2, 4, 4.
    truth = truth_of([[1, 2], [3, 4], [5, 6]], [[0.9, 0.1], [0.5, 0.5], [0.8, 0.2]])
    tally.add(guess_of([[2, 1, 0, 7], [3, 0, 7, 4], [0, 1, 2, 3]]), truth, EXPERTS)
    assert tally.recall(0) == pytest.approx(3 / 6)
    assert tally.recall(1) == pytest.approx(4 / 6)
    assert tally.exact_set(0) == pytest.approx(1 / 3)
    assert tally.exact_set(2) == pytest.approx(2 / 3)
    assert tally.missed_mass() == pytest.approx(1 - 1.5 / 3)


def test_what_is_no_expert_counts_on_neither_side() -> None:
    tally = LayerTally()
    tally.add(guess_of([[1, EXPERTS]]), truth_of([[1, EXPERTS]], [[0.4, 0.6]]), EXPERTS)
    assert tally.recall(0) == 1
    assert tally.exact_set(0) == 1
    assert tally.missed_mass() == pytest.approx(0)
    assert tally.slots == 1


def test_the_mean_leaves_out_the_first_layer_and_those_without_a_guess() -> None:
    tally = LayerTallies.of(4)
    tally.layers[0].add(guess_of([[0, 1]]), truth_of([[2, 3]]), EXPERTS)
    tally.layers[1].add(guess_of([[2, 1]]), truth_of([[2, 3]]), EXPERTS)
    tally.layers[3].add(guess_of([[3, 2]]), truth_of([[2, 3]]), EXPERTS)
    figures = tally.as_dict()
    assert figures["recall_k"] == [0, 0.5, None, 1]
    assert figures["mean"]["recall_k"] == pytest.approx(0.75)
    assert LayerTallies.of(2).as_dict()["mean"]["recall_k"] is None


@pytest.mark.parametrize("width", [4, 8])
def test_random_guesses_read_width_over_experts(width: int) -> None:
    tokens, truth = 4000, random_truth(4000)
    guess = uniform(seed=3)(moment_of(truth, context=100), width)
    assert guess is not None
    recall = float((guess.ids[:, :, None] == truth.ids[:, None, :]).sum()) / truth.ids.numel()
    expected = width / EXPERTS
    five_sigma = 5 * (expected * (1 - expected) / (tokens * 4)) ** 0.5
    assert abs(recall - expected) < five_sigma


def test_a_shuffled_guess_keeps_its_rows_and_loses_its_tokens() -> None:
    truth = random_truth(512)
    perfect = lambda moment, width: TokenGuess(moment.now.ids, moment.now.weights)  # noqa: E731
    moment = moment_of(truth, context=64)
    guess = shuffled(perfect)(moment, 4)
    assert guess is not None
    assert sorted(guess.ids.tolist()) == sorted(truth.ids.tolist())
    tally = LayerTally()
    tally.add(guess, truth, EXPERTS)
    assert tally.recall(0) < 0.4
    again = shuffled(perfect)(moment, 4)
    assert again is not None
    assert torch.equal(guess.ids, again.ids)


def test_previous_token_repeats_its_choice_within_a_row_only() -> None:
    popularity = Popularity([torch.zeros(EXPERTS, dtype=torch.int64), torch.arange(EXPERTS)])
    truth = truth_of([[1, 2], [3, 4], [5, 6], [7, 8]], [[0.4, 0.6]] * 4)
    guess = previous_token(popularity)(moment_of(truth, context=2), 3)
    assert guess is not None
    popular = [15, 14, 13]
    # Its weightier expert first, then what is popular.
    assert guess.ids.tolist() == [popular, [2, 1, 15], popular, [6, 5, 15]]


def test_popularity_learns_what_has_passed() -> None:
    popularity = Popularity([torch.zeros(EXPERTS, dtype=torch.int64)] * 2)
    moment = moment_of(truth_of([[1, 2], [2, EXPERTS], [2, 1]]), context=3)
    popularity.learn(moment)
    assert popularity(moment, 2).ids.tolist() == [[2, 1]] * 3
    assert popularity.scores(0).sum() == 0


def test_the_hybrid_takes_the_least_missed_mass_of_each_layer() -> None:
    assert choose({"a": [0.1, 0.3, None, None], "b": [0.2, 0.2, 0.5, None]}) == ["a", "b", "b", None]
    assert choose({"a": [0.1], "b": [0.1]}) == ["a"]
