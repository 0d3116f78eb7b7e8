"""How a linear guess of a router is fitted and read: by its logits where they decide, else by the router's own rule.

Most routers choose their best logits. Others add corrections, or choose groups first: their guessed logits are read by
letting the router itself choose. Its logits are linear in its input, so one product gives an input with the guessed
logits, and the rule that follows need not be known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foreroute.predict.base import TokenGuess, guess_from_scores
from foreroute.predict.lookahead import NextRouter

_PROBED_STATES = 256
# A correction hardly matters for large logits, and decides for small ones: both are tested.
_PROBED_SCALES = (1.0, 0.02)
# A router is plain when it chooses its best logits for this share of tokens: equal ones may be ordered otherwise.
_PLAIN_SHARE = 0.99
_LINEAR_TOLERANCE = 1e-3
# For routers that need only the hidden state.
_ALWAYS = "a router that runs on its own always runs"


@dataclass(frozen=True)
class OwnRule:
    """Applies a router's selection rule to given logits, by running it on an input that produces them.

    to_input: [experts, hidden] float32: from logits to that input. at_zero: [experts] float32: logits of a zero input.
    """

    router: NextRouter
    to_input: torch.Tensor
    at_zero: torch.Tensor
    dtype: torch.dtype

    def __call__(self, logits: torch.Tensor, width: int) -> TokenGuess:
        """Choose `width` experts per row of `logits` [tokens, experts]. Cost: [experts, hidden] product, router."""
        guess = self.router.guess(((logits - self.at_zero) @ self.to_input).to(self.dtype), width)
        assert guess is not None, _ALWAYS
        return guess


@dataclass(frozen=True)
class Selection:
    """How one layer's guess is fitted (to logits or choices) and read (by the best scores or the router's rule)."""

    reads_logits: bool
    rule: OwnRule | None = None

    def targets(self, logits: torch.Tensor | None, ids: torch.Tensor, num_experts: int) -> torch.Tensor:
        """Fitting targets [tokens, num_experts], float32: the gate `logits`, or else 1 for each of `ids`."""
        if self.reads_logits and logits is not None and len(logits) == len(ids):
            return logits[:, :num_experts].float()
        return chosen_experts(ids, num_experts)

    def __call__(self, scores: torch.Tensor, width: int) -> TokenGuess:
        """Read `scores` [tokens, experts] as a guess of `width` experts per token."""
        return guess_from_scores(scores, width) if self.rule is None else self.rule(scores, width)


def selection_of(router: NextRouter | None, hidden: int, dtype: torch.dtype) -> Selection:
    """Find the router's kind by running it on random states: the same answer for the same weights.

    Args:
        router: None where it cannot be run on its own. hidden: width of its input. dtype: of its input.
    """
    if router is None or router.logits_at < 0:
        return Selection(reads_logits=False)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(_PROBED_STATES, hidden, generator=generator, dtype=torch.float32)
    with torch.no_grad():
        if all(_is_plain(router, (states * scale).to(dtype)) for scale in _PROBED_SCALES):
            return Selection(reads_logits=True)
        rule = _own_rule(router, states.to(dtype))
    return Selection(reads_logits=rule is not None, rule=rule)


def _is_plain(router: NextRouter, states: torch.Tensor) -> bool:
    outputs = router.route(states)
    assert outputs is not None, _ALWAYS
    ids = outputs[router.ids_at]
    best = torch.topk(_logits_in(outputs, router), ids.shape[1]).indices
    same = (best.sort(-1).values == ids.sort(-1).values).all(-1)
    return float(same.float().mean()) >= _PLAIN_SHARE


def _own_rule(router: NextRouter, states: torch.Tensor) -> OwnRule | None:
    """Build the rule from the router's outputs on unit vectors; None where its logits are not linear in its input."""
    hidden = states.shape[1]
    at_zero = _logits(router, torch.zeros_like(states[:1]))[0]
    weights = _logits(router, torch.eye(hidden, dtype=states.dtype)) - at_zero
    expected = _logits(router, states)
    found = states.float() @ weights + at_zero
    rank_is_full = weights.shape[1] <= hidden and int(torch.linalg.matrix_rank(weights)) == weights.shape[1]
    if not rank_is_full or float((found - expected).norm() / expected.norm()) > _LINEAR_TOLERANCE:
        return None
    return OwnRule(router, torch.linalg.pinv(weights).contiguous(), at_zero, states.dtype)


def _logits(router: NextRouter, states: torch.Tensor) -> torch.Tensor:
    outputs = router.route(states)
    assert outputs is not None, _ALWAYS
    return _logits_in(outputs, router)


def _logits_in(outputs: Sequence[torch.Tensor], router: NextRouter) -> torch.Tensor:
    return outputs[router.logits_at][:, : router.num_experts].float()


def chosen_experts(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[tokens, num_experts] float32: 1 for each of `ids` [tokens, k], 0 elsewhere; ids outside the experts left out."""
    chosen = torch.zeros(len(ids), num_experts + 1, dtype=torch.float32)
    return chosen.scatter_(1, ids.clamp(max=num_experts), 1.0)[:, :num_experts]
