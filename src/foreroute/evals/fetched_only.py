"""Run a model under a policy without a cache: at each layer, only the experts guessed for it are resident.

This depends on the token alone, so whole texts and batches of answers are computed in one pass. The rules are those
of policy/, on tensors; a test checks that both agree.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from foreroute.errors import PolicyError
from foreroute.loading.offloaded_model import OffloadedModel, handle_of
from foreroute.model.experts import ExpertsForward
from foreroute.model.hooks import ResidualTap
from foreroute.policy import SPECULATIVE, Policy
from foreroute.predict import build as known
from foreroute.predict.base import RouterSample, TokenGuess
from foreroute.predict.fitted import RunningContext, context_before
from foreroute.predict.lookahead import weighted_rows, with_no_expert
from foreroute.predict.sidecar import Sidecar


@dataclass
class FetchCounts:
    """Costs of tokens under a policy: tokens, MoE layers passed, and experts fetched, missed and waited for.

    missed, waited: without layer 0, which waits for all its misses: first_waited. stalled: (token, layer) pairs that
    waited for at least one expert, layer 0 included.
    """

    tokens: int = 0
    layers: int = 0
    fetched: int = 0
    missed: int = 0
    waited: int = 0
    first_waited: int = 0
    stalled: int = 0


def mask_to_substitute(policy: Policy, weights: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """Return which misses to substitute, [tokens, k] bool: `policy.misses_to_substitute` for many tokens at once.

    Args:
        weights: [tokens, k] gate weights. missing: [tokens, k] bool.
    """
    if policy.name == SPECULATIVE:
        return missing
    if not policy.substitutes:
        return torch.zeros_like(missing)
    masses = weights.double()
    order = masses.masked_fill(~missing, torch.inf).argsort(dim=-1, stable=True)
    summed = masses.gather(-1, order).cumsum(-1)
    fits = summed <= policy.tau * masses.cumsum(-1)[:, -1:]
    return torch.zeros_like(missing).scatter(-1, order, fits) & missing


class FetchedOnly:
    """Replaces the experts of a loaded model by those available under a policy; see `fetched_only`."""

    def __init__(self, model: OffloadedModel, sidecar: Sidecar, policy: Policy, *, in_prompts: bool) -> None:
        layers, dtype = model.foreroute.layers, model.dtype
        self._engine = model.foreroute.host_engine
        # Layers before it are an encoder's: it reads a prompt, which is exact.
        self._first = first = self._engine.prefetcher.first_layer
        self._policy = policy
        self._in_prompts = in_prompts
        self._widths = [layer.experts.num_offloaded for layer in layers]
        self._predictor = known.hybrid(layers, dtype, sidecar)
        self._paper = known.default_vectors(layers, sidecar)
        self._table, self._select = sidecar.token_table, known.selections(layers[first : first + 1], dtype)[0]
        self._rows = [None if vectors is None else with_no_expert(vectors) for vectors in sidecar.default_vectors]
        self._before: RouterSample | None = None
        self._context = RunningContext()
        self._token_ids = torch.empty(0, 0, dtype=torch.int64)
        self.tap = ResidualTap([layer.norm for layer in layers])
        self.tally = FetchCounts()

    def begin(self, token_ids: torch.Tensor) -> None:
        """Start a forward pass of `token_ids` [rows, positions]."""
        self._token_ids, self._before = token_ids, None

    def of_layer(self, layer: int, compute: ExpertsForward) -> ExpertsForward:
        """Wrap a layer's experts, given `compute`, which computes them all."""

        def forward(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            if layer < self._first:
                return compute(hidden, ids, weights)
            if layer == self._first:
                self._count_first(hidden, ids)
            elif not (self._engine.is_prefill and not self._in_prompts):
                guess = self._guess(layer - 1, ids.shape[1])
                if guess is not None:
                    return self._approximate(layer, compute, RouterSample(hidden, ids, weights), guess)
                self._count_unguessed(layer, ids)
            self._before = RouterSample(hidden, ids, weights, self.tap(layer))
            return compute(hidden, ids, weights)

        return forward

    def _guess(self, layer: int, width: int) -> TokenGuess | None:
        assert self._before is not None, "the first layer comes first"
        predictor = self._paper if self._policy.replaces_route else self._predictor
        return predictor.guess(layer, self._before, width)

    def _approximate(self, layer: int, compute: ExpertsForward, seen: RouterSample, guess: TokenGuess) -> torch.Tensor:
        hidden, ids, weights, _ = seen
        tally, num_guessed = self.tally, int((guess.ids < self._widths[layer]).sum())
        tally.layers += len(ids)
        tally.fetched += num_guessed
        if self._policy.replaces_route:
            ids, weights = guess.ids, guess.weights.to(weights.dtype)
            self._before = RouterSample(hidden, ids, weights, self.tap(layer))
            return compute(hidden, ids, weights)
        self._before = RouterSample(hidden, ids, weights, self.tap(layer))
        missing = ~(ids[:, :, None] == guess.ids[:, None, :]).any(-1) & (ids < self._widths[layer])
        rows = self._rows[layer]
        dropped = torch.zeros_like(missing)
        if rows is not None:
            # Padding ids have no mass.
            dropped = mask_to_substitute(self._policy, weights * (ids < self._widths[layer]), missing)
        waited = missing & ~dropped
        tally.missed += int(missing.sum())
        tally.waited += int(waited.sum())
        tally.stalled += int(waited.any(-1).sum())
        if rows is None or not bool(dropped.any()):
            return compute(hidden, ids, weights)
        total = compute(hidden, ids, weights.masked_fill(dropped, 0))
        return total + weighted_rows(rows, RouterSample(hidden, ids, weights * dropped)).to(total.dtype)

    def _count_unguessed(self, layer: int, ids: torch.Tensor) -> None:
        """Count a layer without a guess, which waits for all its experts."""
        num_experts = int((ids < self._widths[layer]).sum())
        self.tally.layers += len(ids)
        self.tally.missed += num_experts
        self.tally.waited += num_experts
        self.tally.stalled += len(ids)

    def _count_first(self, hidden: torch.Tensor, ids: torch.Tensor) -> None:
        """Count the first layer's waits for experts that its table did not guess. Prompts are exact and not counted."""
        rows, positions = self._token_ids.shape
        if not self._engine.is_prefill or self._in_prompts:
            found = torch.zeros_like(ids, dtype=torch.bool)
            if self._table is not None:
                context = (
                    context_before(hidden.view(rows, positions, -1)).flatten(0, 1)
                    if positions > 1
                    else self._context.of_rows(rows)
                )
                guess = self._table.guess(self._token_ids.flatten(), context, ids.shape[1], self._select)
                found = (ids[:, :, None] == guess.ids[:, None, :]).any(-1)
                self.tally.fetched += guess.ids.numel()
            self.tally.tokens += len(ids)
            self.tally.layers += len(ids)
            self.tally.first_waited += int((~found).sum())
            self.tally.stalled += int((~found).any(-1).sum())
        self._context.see(hidden, rows)


@contextmanager
def fetched_only(model: OffloadedModel, sidecar: Sidecar, policy: Policy, *, in_prompts: bool) -> Iterator[FetchCounts]:
    """While inside, compute the model under `policy` without a cache, and count what that would have cost.

    Args:
        model: from `foreroute.load`, best with all experts in memory, decoding exactly. sidecar: its predictors.
        in_prompts: apply the policy also where several positions pass at once: to texts rather than answers.
    Raises:
        PolicyError: this model does not support the policy.
    """
    handle = handle_of(model)
    handle.check_policy(policy)
    if len(handle.policies) != 1 or handle.policies[0] != Policy():
        raise PolicyError(f"The model decodes under {', '.join(map(str, handle.policies))}; set it to exact first.")

    only = FetchedOnly(model, sidecar, policy, in_prompts=in_prompts)

    def begin(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = [kwargs[name] for name in ("decoder_input_ids", "input_ids") if kwargs.get(name) is not None]
        only.begin(named[0] if named else args[0])

    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with handle.computing(only.of_layer):
            yield only.tally
    finally:
        hook.remove()
        only.tap.remove()
