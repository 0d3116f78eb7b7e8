"""The states that an approximate policy sees: a routed expert that was not guessed is stood in for, never waited for.

A predictor fitted to exact states meets others when a policy runs without some experts. Running the text this way,
and fitting again, shows it the states that it will meet.
"""

from collections.abc import Sequence

import torch

from foreroute.predict.base import Predictor, RouterSample
from foreroute.predict.default_vector import weighted_rows, with_no_expert


class StandIns:
    """Decides which experts a layer lacks, and what stands in for them.

    Args:
        predictor: its top-k guess for a layer is all that is there; a layer without a guess has everything.
        default_vectors: per MoE layer [experts, hidden]; a layer without them has everything.
    """

    def __init__(self, predictor: Predictor, default_vectors: Sequence[torch.Tensor | None]) -> None:
        self._predictor = predictor
        self._rows = [None if vectors is None else with_no_expert(vectors) for vectors in default_vectors]

    def missing(self, layer: int, before: RouterSample | None, ids: torch.Tensor) -> torch.Tensor | None:
        """[tokens, k] bool: which of the routed `ids` are not there; None where nothing is missing.

        Args:
            before: what the MoE layer before saw; None for layer 0, which waits.
        """
        if before is None or self._rows[layer] is None:
            return None
        guess = self._predictor.guess(layer - 1, before, ids.shape[1])
        return None if guess is None else ~(ids[:, :, None] == guess.ids[:, None, :]).any(-1)

    def sum_of(self, layer: int, seen: RouterSample) -> torch.Tensor:
        """[tokens, hidden]: the default vectors of `seen`'s experts by gate weight, in its hidden states' dtype."""
        rows = self._rows[layer]
        assert rows is not None, "nothing stands in for this layer"
        return weighted_rows(rows, seen).to(seen.hidden.dtype)
