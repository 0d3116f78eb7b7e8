"""What a training step of a decoder scores: the next token."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from foreroute.evals.text import bits_per_char
from models.data import IGNORE, Rows, held_out_windows
from models.families import Recipe
from models.loss import projected_cross_entropy


class Objective(Protocol):
    """The loss of a part of a step, and the held-out figure that is followed in training."""

    def loss(self, step: int, part: int) -> Tensor:
        """Mean loss of this part of the step, in nats per scored token."""
        ...

    def held_out_bits(self) -> float:
        """Bits per held-out character."""
        ...


class NextToken:
    """Cross-entropy of the next token."""

    def __init__(self, recipe: Recipe, work: Path, model: PreTrainedModel) -> None:
        self.recipe, self.work, self.model = recipe, work, model
        self.rows = Rows(work, recipe.seq_len, recipe.seed, recipe.text_share, recipe.kind_weights)

    def loss(self, step: int, part: int) -> Tensor:
        """Mean loss of this part of the step, in nats per scored token."""
        ids, labels = self.rows.batch(step, part, self.recipe.rows)
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        scored = labels.reshape(-1) != IGNORE
        states = hidden.reshape(-1, hidden.shape[-1])[scored]
        return projected_cross_entropy(states, self.model.lm_head.weight, labels.reshape(-1)[scored])

    def held_out_bits(self) -> float:
        """Bits per held-out character, the shares of the sources applied."""
        return bits_per_char(self.model, held_out_windows(self.work, self.recipe.seq_len, 6))["all"]
