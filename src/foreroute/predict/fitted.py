"""Predictors that `foreroute fit` fits to text, and how their scores are read; prepare/ fits them.

Ridge: a linear map per layer, from router input and gate weights to the next router's logits. Its inputs carry as much
as the paper's quasi-hidden state, and need neither the residual nor the norms.

Selection: most routers choose their best logits. Others add corrections, or choose groups first: their guessed logits
are read by letting the router itself choose. Its logits are linear in its input, so one product gives an input with the
guessed logits, and the rule that follows need not be known.

Estimator, the paper's: one small network for all layers, from the quasi-hidden state to router logits. Linear d -> d/m,
plus a learned embedding of the layer, a SiLU MLP d/m -> n d/m -> d/m with residual, LayerNorm, and a head to the expert
logits (arXiv 2603.19289).

TokenTable: layer 0's experts, which no layer precedes, from the token and its context: the router input of layer 0 at
the tokens before it, the recent ones most, as its attention mixes something like it into the router's input. Both are
known before the step begins.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from foreroute.predict.base import Predictor, RouterSample, Select, TokenGuess, guess_from_scores
from foreroute.predict.lookahead import NextRouter, weighted_rows

_PROBED_STATES = 256
# A correction hardly matters for large logits, and decides for small ones: both are tested.
_PROBED_SCALES = (1.0, 0.02)
# A router is plain when it chooses its best logits for this share of tokens: equal ones may be ordered otherwise.
_PLAIN_SHARE = 0.99
_LINEAR_TOLERANCE = 1e-3
# For routers that need only the hidden state.
_ALWAYS = "a router that runs on its own always runs"

# (layer, seen) -> [tokens, hidden]: what the estimator reads.
Inputs = Callable[[int, RouterSample], torch.Tensor]

# Weight of a token in the context, relative to the one after it.
_DECAY = 0.8
# Older ones count less than a millionth.
_MOST_POSITIONS = 64


@dataclass(frozen=True)
class RidgeLayer:
    """A linear map from one MoE layer to the next, all float32.

    from_hidden: [hidden, next experts]. from_gates: [experts + 1, next experts]; its last row is zero, for ids outside
    the layer's experts. bias: [next experts].
    """

    from_hidden: torch.Tensor
    from_gates: torch.Tensor
    bias: torch.Tensor

    def scores(self, seen: RouterSample) -> torch.Tensor:
        """Scores [tokens, next experts], higher is likelier."""
        scores = torch.addmm(self.bias, seen.hidden.float(), self.from_hidden)
        return scores.add_(weighted_rows(self.from_gates, seen))


class Ridge:
    """Predicts with one linear map per layer.

    Args:
        layers: per MoE layer; None where none was fitted.
        selects: per MoE layer, how scores of the next one are read; the best scores when left out.
    """

    def __init__(self, layers: Sequence[RidgeLayer | None], selects: Sequence[Select] | None = None) -> None:
        self._layers = list(layers)
        self._selects = selects or [guess_from_scores] * len(self._layers)

    def guess(self, layer: int, seen: RouterSample, width: int) -> TokenGuess | None:
        """See `Predictor`. Cost: one [tokens, hidden] x [hidden, experts] product in fp32."""
        entry = self._layers[layer] if layer < len(self._layers) else None
        return None if entry is None else self._selects[layer](entry.scores(seen), width)


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


def estimate(weights: Mapping[str, torch.Tensor], inputs: torch.Tensor, layer: torch.Tensor | int) -> torch.Tensor:
    """Compute expert logits [tokens, experts] of `inputs` [tokens, hidden] with `weights`, for MoE layer `layer` or one
    layer per token [tokens]."""
    inner = inputs.float() @ weights["down"] + weights["layer"][layer]
    wide = F.silu(torch.addmm(weights["up_bias"], inner, weights["up"]))
    inner = inner + torch.addmm(weights["back_bias"], wide, weights["back"])
    normed = F.layer_norm(inner, inner.shape[-1:], weights["norm"], weights["norm_bias"])
    return torch.addmm(weights["head_bias"], normed, weights["head"])


class Estimator:
    """Predicts with the trained network.

    Args:
        weights: see `new_weights`, e.g. embed [layers, d]. inputs: as in training. num_experts: per MoE layer.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], inputs: Inputs, num_experts: list[int]) -> None:
        self._weights = weights
        self._inputs = inputs
        self._num_experts = num_experts

    def guess(self, layer: int, seen: RouterSample, width: int) -> TokenGuess | None:
        """See `Predictor`. Cost: parameters of the network x tokens multiply-adds in fp32."""
        if layer + 1 >= len(self._num_experts):
            return None
        scores = estimate(self._weights, self._inputs(layer, seen), layer)
        return guess_from_scores(scores[:, : self._num_experts[layer + 1]], width)


class Hybrid:
    """Dispatches to one predictor per layer.

    Args:
        predictors: by name.
        choice: per MoE layer the name of the predictor of the next layer; None for no guess.
    """

    def __init__(self, predictors: Mapping[str, Predictor], choice: Sequence[str | None]) -> None:
        self._by_layer = [None if name is None else predictors[name] for name in choice]

    def guess(self, layer: int, seen: RouterSample, width: int) -> TokenGuess | None:
        """See `Predictor`. Cost: that of the layer's own predictor."""
        predictor = self._by_layer[layer] if layer < len(self._by_layer) else None
        return None if predictor is None else predictor.guess(layer, seen, width)


def context_before(hidden: torch.Tensor) -> torch.Tensor:
    """The context of every position of a prompt: [rows, positions, width] float32; zero for the first.

    Args:
        hidden: [rows, positions, width], the router's input of layer 0.
    """
    num_positions = hidden.shape[1]
    age = torch.arange(num_positions)[:, None] - 1 - torch.arange(num_positions)
    share = torch.where(age >= 0, (1 - _DECAY) * _DECAY ** age.clamp(min=0).float(), 0.0)
    return share @ hidden.float()


class RunningContext:
    """The context of each row's next token during decoding."""

    def __init__(self) -> None:
        self._rows: torch.Tensor | None = None
        # The contexts before each position of the last step, where some of these may be dropped.
        self._before: list[torch.Tensor] = []

    def see(self, hidden: torch.Tensor, num_rows: int, *, goes_on: bool = False) -> None:
        """Add layer 0's router input `hidden` [num_rows x positions, width] of a step.

        Several positions start a text, unless it `goes_on`: then the last of them may be dropped. If the tokens are not
        a whole number of positions per row, the call is another one and the context is unknown.
        """
        self._before = []
        if len(hidden) % num_rows:
            self._rows = None
            return
        rows = hidden.detach().view(num_rows, -1, hidden.shape[-1]).float()
        if goes_on and self._rows is not None and len(self._rows) == num_rows:
            for position in rows.unbind(1):
                self._before.append(self._rows)
                self._rows = torch.lerp(position, self._rows, _DECAY)
            return
        if rows.shape[1] > 1 or self._rows is None or len(self._rows) != num_rows:
            self._rows = (
                torch.zeros_like(rows[:, 0])
                if rows.shape[1] == 1
                else context_before(rows[:, -_MOST_POSITIONS:])[:, -1]
            )
        self._rows = torch.lerp(rows[:, -1], self._rows, _DECAY)

    def drop_last(self, count: int) -> None:
        """Forget the last `count` positions of the last step; the context is unknown where they began the text."""
        self._rows = self._before[-count] if 0 < count <= len(self._before) else None
        self._before = []

    def of_rows(self, num_rows: int) -> torch.Tensor | None:
        """The context [rows, width]; None unless the last step had `num_rows` rows."""
        return self._rows if self._rows is not None and len(self._rows) == num_rows else None


@dataclass(frozen=True)
class TokenTable:
    """Scores MoE layer 0's experts by token and context.

    scores: [vocabulary, experts], any float dtype: by token, in the contexts in which it was seen.
    from_context: [width, experts] float32: added for the difference between a context and mean_context [width], the
    mean over all tokens. A token whose own contexts are unlike others' is shifted by that difference twice: sums of
    contexts by token would correct it, and take vocabulary x width numbers.
    """

    scores: torch.Tensor
    from_context: torch.Tensor
    mean_context: torch.Tensor

    def guess(
        self, token_ids: torch.Tensor, context: torch.Tensor | None, width: int, select: Select = guess_from_scores
    ) -> TokenGuess:
        """Predict for `token_ids` [tokens] in `context` [tokens, width] (None: the mean); `select` reads the scores.

        Cost: one row per token, and one [tokens, width] x [width, experts] product in fp32.
        """
        scores = self.scores[token_ids].float()
        if context is not None:
            scores = torch.addmm(scores, context - self.mean_context, self.from_context)
        return select(scores, width)
