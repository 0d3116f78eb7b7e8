"""The lookahead keeps the router's own choice, best first, and lengthens it by the next best logits."""

import torch

from foreroute.predict import base
from foreroute.predict.base import RouterSample, most_wanted
from foreroute.predict.lookahead import NextRouter, RouterLookahead

EXPERTS = 6
LOGITS = torch.tensor([[0.1, 5.0, 4.0, 3.0, 2.0, 1.0], [9.0, 0.0, 1.0, 2.0, 3.0, 4.0]])


def grouped(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A router whose choice is not the best logits, and comes unsorted: weights, ids, logits."""
    ids = torch.tensor([[4, 1], [1, 0]])[: len(hidden)]
    return torch.tensor([[0.3, 0.7], [0.4, 0.6]])[: len(hidden)], ids, LOGITS[: len(hidden)]


def router(scale: torch.Tensor | None = None, logits_at: int = 2) -> NextRouter:
    return NextRouter(grouped, ids_at=1, weights_at=0, logits_at=logits_at, num_experts=EXPERTS, scale=scale)


SEEN = RouterSample(torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2))


def test_the_routers_own_choice_comes_first_and_by_weight() -> None:
    guess = router().guess(SEEN.hidden, 2)
    assert guess.ids.tolist() == [[1, 4], [0, 1]]
    assert guess.weights.tolist() == LOGITS.new_tensor([[0.7, 0.3], [0.6, 0.4]]).tolist()


def test_beyond_its_top_k_the_next_best_logits_follow_once_each() -> None:
    guess = router().guess(SEEN.hidden, 4)
    assert guess.ids.tolist() == [[1, 4, 2, 3], [0, 1, 5, 4]]
    # What their logits give them, and so less than what the router chose by its best logits.
    assert (guess.weights[:, 2:] > 0).all()
    assert (guess.weights.diff(dim=-1)[:, 2:] <= 0).all()


def test_a_width_of_all_experts_or_more_names_each_once() -> None:
    for width in (EXPERTS, EXPERTS + 5):
        ids = router().guess(SEEN.hidden, width).ids
        assert [sorted(row) for row in ids.tolist()] == [list(range(EXPERTS))] * 2


def test_a_smaller_width_keeps_the_best() -> None:
    assert router().guess(SEEN.hidden, 1).ids.tolist() == [[1], [0]]


def test_without_logits_the_guess_stays_the_routers() -> None:
    assert router(logits_at=-1).guess(SEEN.hidden, 5).ids.shape == (2, 2)


def test_the_router_reads_the_input_as_its_own_norm_would_make_it() -> None:
    read: list[torch.Tensor] = []

    def noting(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        read.append(hidden)
        return grouped(hidden)

    scale = torch.tensor([1.0, 2.0, 4.0])
    predictor = RouterLookahead([NextRouter(noting, 1, 0, 2, EXPERTS, scale), None])
    predictor.guess(0, RouterSample(torch.ones(2, 3), SEEN.ids, SEEN.weights), 2)
    assert read[0].tolist() == [[1, 2, 4]] * 2
    assert predictor.guess(1, SEEN, 2) is None
    assert predictor.guess(2, SEEN, 2) is None


def test_most_wanted_counts_votes_by_rank_and_drops_what_is_no_expert() -> None:
    assert most_wanted(torch.tensor([[3, 9, 1]]), num_experts=5) == [3, 1]
    # 0: 3 votes; 1: 2 + 2; 2: 1 + 3.
    # Votes: 3 for expert 0, 2 + 2 for 1, 1 + 3 for 2.
    assert most_wanted(torch.tensor([[0, 1, 2], [2, 1, 9]]), num_experts=5) == [1, 2, 0]


def test_what_comes_sorted_is_taken_as_it_comes() -> None:
    sorted_router = NextRouter(grouped, 1, 0, 2, EXPERTS, scale=None, is_sorted=True)
    assert sorted_router.guess(SEEN.hidden, 2).ids.tolist() == [[4, 1], [1, 0]]
    assert sorted_router.guess(SEEN.hidden, 3).ids.tolist() == [[4, 1, 2], [1, 0, 5]]


def test_votes_are_counted_alike_for_few_rows_and_for_many(monkeypatch) -> None:
    ids = torch.randint(0, 12, (40, 5), generator=torch.Generator().manual_seed(0))
    of_few = most_wanted(ids, num_experts=10)
    monkeypatch.setattr(base, "_FEW_VOTES", 0)
    assert most_wanted(ids, num_experts=10) == of_few
    assert len(of_few) == 10
