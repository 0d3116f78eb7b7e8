"""The ridge finds what was planted, in whatever pieces the rows come, and no id that is no expert disturbs it."""

from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foreroute.predict.base import RouterSample
from foreroute.predict.fitted import Ridge
from foreroute.prepare.solvers import NormalEquations, RidgeFit

HIDDEN, EXPERTS, TARGETS, TOP_K = 12, 6, 5, 2


def seen_of(tokens: int, seed: int = 0) -> RouterSample:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    weights = torch.rand(tokens, TOP_K, generator=generator)
    return RouterSample(
        torch.randn(tokens, HIDDEN, generator=generator) * 3 + 1, ids, weights / weights.sum(-1, keepdim=True)
    )


def planted(seen: RouterSample) -> torch.Tensor:
    """A linear map of the router input and of the gate weights, with a bias."""
    generator = torch.Generator().manual_seed(99)
    from_hidden = torch.randn(HIDDEN, TARGETS, generator=generator)
    from_gates = 5 * torch.randn(EXPERTS, TARGETS, generator=generator)
    gates = torch.zeros(len(seen.ids), EXPERTS).scatter_add(1, seen.ids, seen.weights)
    return seen.hidden @ from_hidden + gates @ from_gates + torch.arange(TARGETS)


def fitted(penalty: float = 1e-9, tokens: int = 500) -> RidgeFit:
    fit = RidgeFit(HIDDEN, EXPERTS, TARGETS)
    fit.add(seen_of(tokens), planted(seen_of(tokens)))
    return fit


def test_a_planted_linear_map_is_recovered() -> None:
    fresh = seen_of(200, seed=1)
    scores = fitted().solve(1e-9).scores(fresh)
    torch.testing.assert_close(scores, planted(fresh), rtol=1e-3, atol=1e-3)


def test_guesses_are_the_best_scores_best_first() -> None:
    fresh = seen_of(50, seed=2)
    guess = Ridge([fitted().solve(1e-9)]).guess(0, fresh, 3)
    assert guess is not None
    assert guess.ids.tolist() == planted(fresh).topk(3).indices.tolist()
    torch.testing.assert_close(guess.weights.sum(-1), torch.ones(50))
    assert (guess.weights.diff(dim=-1) <= 0).all()


def test_streaming_equals_a_batch_solve_in_double_precision() -> None:
    seen, targets = seen_of(300), planted(seen_of(300))
    pieces = RidgeFit(HIDDEN, EXPERTS, TARGETS)
    for start in range(0, 300, 7):
        part = RouterSample(*(tensor[start : start + 7] for tensor in seen[:3]))
        pieces.add(part, targets[start : start + 7])
    gates = torch.zeros(300, EXPERTS).scatter_add(1, seen.ids, seen.weights)
    x = torch.cat([seen.hidden, gates], 1).double()
    centred = x - x.mean(0)
    scale = centred.pow(2).mean(0).sqrt()
    # Augmented least squares: the penalty as further rows.
    penalty = 0.01
    rows = torch.cat([centred / scale / 300**0.5, penalty**0.5 * torch.eye(x.shape[1], dtype=torch.float64)])
    y = targets.double()
    right = torch.cat([(y - y.mean(0)) / 300**0.5, torch.zeros(x.shape[1], TARGETS, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, right, driver="gelsd").solution / scale[:, None]
    weights, bias = pieces.equations.solve(penalty)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(bias, y.mean(0) - x.mean(0) @ expected, rtol=1e-6, atol=1e-6)


def test_the_penalty_does_not_depend_on_a_features_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(100, 2, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1.0, 1e-3, 1e3, 7.0], dtype=torch.float64)
    plain, scaled = NormalEquations(4, 2), NormalEquations(4, 2)
    plain.add(x, y)
    scaled.add(x * scale, y)
    torch.testing.assert_close(scaled.solve(0.3)[0] * scale[:, None], plain.solve(0.3)[0], rtol=1e-6, atol=1e-9)


def test_a_feature_that_never_varies_gets_no_weight() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 4.0
    equations = NormalEquations(3, 1)
    equations.add(x, x[:, :1])
    weights, bias = equations.solve(1e-6)
    assert weights[1].item() == 0
    assert weights[0].item() == pytest.approx(1, abs=1e-3)
    assert bias.item() == pytest.approx(0, abs=1e-3)


def test_an_id_that_is_no_expert_adds_nothing() -> None:
    layer = fitted().solve(1e-6)
    seen = seen_of(20, seed=3)
    ids, weights = seen.ids.clone(), seen.weights.clone()
    weights[:, 1] = 0
    without = layer.scores(RouterSample(seen.hidden, ids, weights))
    ids[:, 1], weights[:, 1] = EXPERTS + 3, 0.7
    torch.testing.assert_close(layer.scores(RouterSample(seen.hidden, ids, weights)), without)


def test_one_token_scores_as_it_does_among_others() -> None:
    layer, seen = fitted().solve(1e-6), seen_of(9, seed=4)
    alone = torch.cat([layer.scores(RouterSample(*(part[at : at + 1] for part in seen[:3]))) for at in range(9)])
    torch.testing.assert_close(alone, layer.scores(seen), rtol=1e-5, atol=1e-5)


def test_solving_takes_one_square_of_doubles() -> None:
    features = 64

    class Squares(TorchDispatchMode):
        """Where the features' squares in float64 lie that any operation gave."""

        found: ClassVar[set[int]] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for one in result if isinstance(result, tuple | list) else [result]:
                if isinstance(one, torch.Tensor) and one.dtype == torch.float64 and one.numel() == features**2:
                    self.found.add(one.untyped_storage().data_ptr())
            return result

    equations = NormalEquations(features, 3)
    generator = torch.Generator().manual_seed(0)
    equations.add(torch.randn(500, features, generator=generator), torch.randn(500, 3, generator=generator))
    with Squares() as squares:
        equations.solve(1e-3)
    assert len(squares.found - {equations.gram.untyped_storage().data_ptr()}) == 1


def test_sums_that_are_not_finite_are_refused() -> None:
    equations = NormalEquations(4, 2)
    equations.add(torch.full((8, 4), float("nan")), torch.zeros(8, 2))
    with pytest.raises(ValueError, match="not finite"):
        equations.solve(1e-3)
