"""Produce the states of an approximate policy: routed experts that were not predicted are substituted.

A predictor fitted to exact states meets others when a policy runs without some experts. Running the text so, and
fitting again, shows it those states.
"""

from collections.abc import Sequence

import torch

from foreroute.predict.base import Predictor, RouterSample
from foreroute.predict.lookahead import weighted_rows, with_no_expert


class Substitutes:
    """Decides which of a layer's experts are missing, and substitutes their default vectors.

    Args:
        predictor: only its top-k guess for a layer counts as resident; without a guess, all experts do.
        default_vectors: per MoE layer [experts, hidden]; without them, all experts of the layer count as resident.
    """

    def __init__(self, predictor: Predictor, default_vectors: Sequence[torch.Tensor | None]) -> None:
        self._predictor = predictor
        self._rows = [None if vectors is None else with_no_expert(vectors) for vectors in default_vectors]

    def missing(self, layer: int, before: RouterSample | None, ids: torch.Tensor) -> torch.Tensor | None:
        """Which of the routed `ids` are missing, [tokens, k] bool; None where none is.

        Args:
            before: sample of the MoE layer before; None for layer 0, which waits.
        """
        if before is None or self._rows[layer] is None:
            return None
        guess = self._predictor.guess(layer - 1, before, ids.shape[1])
        return None if guess is None else ~(ids[:, :, None] == guess.ids[:, None, :]).any(-1)

    def sum_of(self, layer: int, seen: RouterSample) -> torch.Tensor:
        """Sum the default vectors of `seen`'s experts in `layer` by gate weight: [tokens, hidden] in its dtype."""
        rows = self._rows[layer]
        assert rows is not None, "this layer has no default vectors"
        return weighted_rows(rows, seen).to(seen.hidden.dtype)
