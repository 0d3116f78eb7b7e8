"""Apply a loaded model's policies in its step: which misses to wait for, and what to substitute for the others."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from foreroute.errors import PolicyError
from foreroute.policy import Policy, waited_for
from foreroute.predict.base import Predictor, RouterSample, TokenGuess


class Tap(Protocol):
    """Captures the residual stream of the current step."""

    def __call__(self, layer: int) -> torch.Tensor | None:
        """Return the residual [tokens, hidden] after attention of MoE layer `layer`, if it is the latest captured."""

    def remove(self) -> None:
        """Stop capturing."""


class WideningGuesses(Protocol):
    """A prefetch source that may guess more experts when some misses are not waited for."""

    without_waiting: bool


class Approximation:
    """The current policies, and what those other than exact need.

    Args:
        make_vectors: makes per MoE layer [experts, hidden] default vectors in the compute dtype, None where none may be
            substituted. Called when a policy first needs them: exact decoding takes no memory for them.
        make_paper: makes the predictor of the next layer's route for `paper`; likewise.
        make_tap: begins to capture the residual stream, which only `paper` reads.
        why_not: policy name -> why this model cannot use it; empty when it can use all.
        guesses: the prefetch source; its `without_waiting` is set when some misses are not waited for.
        first_layer: the first MoE layer of a decode step, which waits: nothing guesses it from a layer before.

    Attributes:
        policies: the current ones. is_exact: they all wait for every miss; read in every layer.
    """

    def __init__(
        self,
        make_vectors: Callable[[], Sequence[torch.Tensor | None]],
        make_paper: Callable[[], Predictor],
        make_tap: Callable[[], Tap],
        why_not: dict[str, str],
        guesses: WideningGuesses | None,
        first_layer: int = 0,
    ) -> None:
        self._make_vectors, self._make_paper, self._make_tap = make_vectors, make_paper, make_tap
        self._vectors: list[torch.Tensor | None] = []
        self._paper: Predictor | None = None
        self._tap: Tap | None = None
        self._why_not = why_not
        self._guesses = guesses
        self._first_layer = first_layer
        self._guess: tuple[int, TokenGuess] | None = None
        self.policies: tuple[Policy, ...] = (Policy(),)
        self.is_exact = True

    def set(self, policies: Sequence[Policy]) -> None:
        """Set the policies from the next step on: one for all rows, or one per row of the batch.

        Raises:
            PolicyError: this model cannot use one of them; nothing has been changed.
        """
        if not policies:
            raise PolicyError("No policy is given. Give one, or one per row of the batch.")
        for policy in policies:
            self.check(policy)
        substitutes = any(policy.substitutes for policy in policies)
        replaces_route = any(policy.replaces_route for policy in policies)
        self.policies = tuple(policies)
        self.is_exact = all(policy.is_exact for policy in policies)
        self._guess = None
        if not self._vectors and substitutes:
            self._vectors = list(self._make_vectors())
        if replaces_route:
            self._paper = self._paper or self._make_paper()
            self._tap = self._tap or self._make_tap()
        elif self._tap is not None:
            self._tap.remove()
            self._tap = None
        if self._guesses is not None:
            self._guesses.without_waiting = substitutes

    def check(self, policy: Policy) -> None:
        """Check that this model can use the policy.

        Raises:
            PolicyError: it cannot; the message says why.
        """
        if policy.name in self._why_not:
            raise PolicyError(f"Policy {policy}: {self._why_not[policy.name]}")

    def of_rows(self, num_rows: int) -> Sequence[Policy]:
        """Return one policy per row of a decode step.

        Raises:
            PolicyError: the number of rows differs from the number of policies.
        """
        if len(self.policies) == 1:
            return self.policies * num_rows
        if len(self.policies) != num_rows:
            raise PolicyError(
                f"{len(self.policies)} policies were set, and the batch has {num_rows} rows. Set one for all, or one "
                "for each."
            )
        return self.policies

    def not_waited_for(
        self,
        layer: int,
        keys: Sequence[int],
        routed: Sequence[Sequence[int]],
        weights: torch.Tensor,
        is_resident: Callable[[int], bool],
    ) -> list[int]:
        """Return those of `layer`'s `keys`, in order, that are missing and not waited for; else as `waited_for`.

        The first layer, and layers without default vectors, wait. Cost: on a miss, a copy of the gate weights.
        routed: per token its expert keys. weights: [tokens, k]. is_resident: whether a key is resident.
        """
        policies = self.of_rows(len(routed))
        substitutes = any(policy.substitutes for policy in policies)
        if layer == self._first_layer or not substitutes or self._vectors[layer] is None:
            return []
        missing = [key for key in keys if not is_resident(key)]
        if not missing:
            return []
        waited = waited_for(policies, routed, weights.tolist(), is_resident)
        return [key for key in missing if key not in waited]

    def vectors(self, layer: int, experts: Sequence[int]) -> torch.Tensor:
        """Return the default vectors [experts, hidden] of these `experts` of `layer`, before gate weights."""
        vectors = self._vectors[layer]
        assert vectors is not None, "this layer has no default vectors"
        return vectors[list(experts)]

    def route(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the route to execute: for rows under `paper` the guess made one layer before, else the router's.

        Args and returns:
            ids, weights: [tokens, k], of `layer`.
        """
        made, self._guess = self._guess, None
        if made is None or made[0] != layer or len(made[1].ids) != len(ids):
            return ids, weights
        guess = made[1]
        replaced = torch.tensor([policy.replaces_route for policy in self.of_rows(len(ids))])[:, None]
        return torch.where(replaced, guess.ids, ids), torch.where(replaced, guess.weights.to(weights.dtype), weights)

    def see(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> TokenGuess | None:
        """Under `paper`, guess the next layer's route from `layer`'s in a decode step, and return it; else None.

        hidden: [tokens, hidden]. ids, weights: [tokens, k].
        """
        if self._paper is None or self._tap is None:
            return None
        guess = self._paper.guess(layer, RouterSample(hidden, ids, weights, self._tap(layer)), ids.shape[1])
        if guess is not None:
            self._guess = (layer + 1, guess)
        return guess
