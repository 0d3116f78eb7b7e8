"""The quasi-hidden state is residual + gate weight x mean output; an expert never seen adds nothing."""

import torch

from foreroute.predict.base import RouterSample
from foreroute.predict.lookahead import DefaultVectors, NextRouter, QuasiHiddenLayer
from foreroute.prepare.solvers import DefaultVectorSums

HIDDEN = 3


def test_default_vectors_are_unweighted_means_and_zero_for_the_unseen() -> None:
    sums = DefaultVectorSums(3, HIDDEN)
    sums.add(0, torch.tensor([[1.0, 2, 3], [3.0, 2, 1]]))
    sums.add(0, torch.tensor([[5.0, 2, 2]]))
    sums.add(2, torch.tensor([[7.0, 8, 9]]))
    assert sums.means().tolist() == [[3, 2, 2], [0, 0, 0], [7, 8, 9]]


def test_the_next_router_reads_the_normed_quasi_hidden_state() -> None:
    read: list[torch.Tensor] = []

    def route(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        read.append(hidden)
        return torch.zeros(len(hidden), 1), torch.zeros(len(hidden), 1, dtype=torch.int64)

    vectors = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0]])
    router = NextRouter(route, ids_at=1, weights_at=0, logits_at=-1, num_experts=2, scale=None)
    predictor = DefaultVectors([QuasiHiddenLayer(vectors, lambda x: 10 * x), None], [router, None])
    residual = torch.tensor([[1.0, 1, 1], [2.0, 2, 2]])
    # The second token's second id is no expert.
    seen = RouterSample(
        torch.zeros(2, HIDDEN), torch.tensor([[0, 1], [1, 9]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]), residual
    )
    assert predictor.guess(0, seen, 1) is not None
    assert read[0].tolist() == [[17.5, 12.5, 10.0], [20.0, 25.0, 20.0]]
    assert predictor.guess(1, seen, 1) is None
