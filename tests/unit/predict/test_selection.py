"""A guess of logits is read by the router's own rule, learnt by asking it; what cannot be read so falls to choices."""

from collections.abc import Callable

import pytest
import torch

from foreroute.predict.base import guess_from_scores
from foreroute.predict.fitted import selection_of
from foreroute.predict.lookahead import NextRouter

HIDDEN, EXPERTS, TOP_K = 24, 8, 2
Rule = Callable[[torch.Tensor], torch.Tensor]
CORRECTION = torch.linspace(-0.4, 0.4, EXPERTS)


def corrected(logits: torch.Tensor) -> torch.Tensor:
    """Best of score plus correction, as DeepSeek's: the correction chooses, and is not in the weights."""
    return torch.topk(logits.sigmoid() + CORRECTION, TOP_K).indices


def grouped(logits: torch.Tensor) -> torch.Tensor:
    """Only the better half of the experts may be chosen."""
    halves = logits.view(-1, 2, EXPERTS // 2)
    is_worse = halves.amax(-1) < halves.amax(-1).amax(-1, keepdim=True)
    return torch.topk(halves.masked_fill(is_worse[:, :, None], -9e9).flatten(1), TOP_K).indices


def plain(logits: torch.Tensor) -> torch.Tensor:
    """The best logits."""
    return torch.topk(logits, TOP_K).indices


def router_of(rule: Rule, logits_of: Rule) -> NextRouter:
    """A router that returns (logits, weights, ids)."""

    def route(states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = logits_of(states.float())
        ids = rule(logits)
        return logits, logits.sigmoid().gather(1, ids), ids

    return NextRouter(route, 2, 1, 0, EXPERTS, None)


def linear(seed: int = 0) -> Rule:
    """A linear map with a bias."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(HIDDEN, EXPERTS, generator=generator) / HIDDEN**0.5
    bias = torch.randn(EXPERTS, generator=generator)
    return lambda states: states @ weights + bias


@pytest.mark.parametrize("rule", [corrected, grouped])
def test_a_router_with_a_rule_of_its_own_is_asked(rule: Rule) -> None:
    selection = selection_of(router_of(rule, linear()), HIDDEN, torch.float32)
    assert selection.reads_logits
    assert selection.rule is not None
    logits = 2 * torch.randn(200, EXPERTS, generator=torch.Generator().manual_seed(5))
    chosen = selection(logits, TOP_K).ids
    assert chosen.sort(-1).values.tolist() == rule(logits).sort(-1).values.tolist()
    # And that is not what the best logits are.
    assert chosen.sort(-1).values.tolist() != plain(logits).sort(-1).values.tolist()
    # What it is fitted to are the logits.
    assert torch.equal(selection.targets(logits, rule(logits), EXPERTS), logits)


def test_a_plain_router_is_read_by_its_best_logits() -> None:
    selection = selection_of(router_of(plain, linear()), HIDDEN, torch.float32)
    assert selection.reads_logits
    assert selection.rule is None
    logits = torch.randn(20, EXPERTS, generator=torch.Generator().manual_seed(5))
    assert torch.equal(selection(logits, 3).ids, guess_from_scores(logits, 3).ids)


def test_a_small_correction_is_seen_too() -> None:
    """Large logits hide it."""

    def slightly(logits: torch.Tensor) -> torch.Tensor:
        return torch.topk(logits + 0.01 * CORRECTION, TOP_K).indices

    assert selection_of(router_of(slightly, linear_without_bias()), HIDDEN, torch.float32).rule is not None


def linear_without_bias() -> Rule:
    """A linear map whose logits are as small as its input."""
    weights = torch.randn(HIDDEN, EXPERTS, generator=torch.Generator().manual_seed(0)) / HIDDEN**0.5
    return lambda states: states @ weights


def test_logits_that_are_not_linear_are_left_alone() -> None:
    def normalised(states: torch.Tensor) -> torch.Tensor:
        return linear()(torch.nn.functional.normalize(states, dim=-1) + states.square())

    selection = selection_of(router_of(corrected, normalised), HIDDEN, torch.float32)
    assert not selection.reads_logits
    assert selection.rule is None
    ids = torch.tensor([[1, 4], [7, EXPERTS + 2]])
    targets = selection.targets(torch.randn(2, EXPERTS), ids, EXPERTS)
    assert targets.tolist() == [[0, 1, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]


def test_a_router_that_cannot_be_asked_is_fitted_to_its_choices() -> None:
    assert not selection_of(None, HIDDEN, torch.float32).reads_logits
    without_logits = NextRouter(router_of(plain, linear()).route, 2, 1, -1, EXPERTS, None)
    assert not selection_of(without_logits, HIDDEN, torch.float32).reads_logits


def test_half_precision_is_close_enough() -> None:
    selection = selection_of(router_of(corrected, linear()), HIDDEN, torch.bfloat16)
    assert selection.rule is not None
    logits = 2 * torch.randn(200, EXPERTS, generator=torch.Generator().manual_seed(5))
    same = (selection(logits, TOP_K).ids.sort(-1).values == corrected(logits).sort(-1).values).all(-1)
    assert same.float().mean() > 0.95
