"""What a training step of an encoder-decoder scores: the labels of its rows."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from models import data
from models.data import IGNORE
from models.families import Recipe
from models.loss import projected_cross_entropy
from models.seq2seq import figures, training
from models.seq2seq.rows import Batch, Rows, with_sentinels


class Denoising:
    """Cross-entropy of the hidden spans and of the tasks' answers."""

    def __init__(self, recipe: Recipe, work: Path, model: PreTrainedModel) -> None:
        self.recipe, self.work, self.model = recipe, work, model
        self.rows = Rows(work, recipe.seed, recipe.text_share, recipe.tail_share, recipe.kind_weights)

    def loss(self, step: int, part: int) -> Tensor:
        """Mean loss of this part of the step, in nats per scored token."""
        batch = self.rows.batch(step, part, self.recipe.rows)
        scored = batch.labels != IGNORE
        return projected_cross_entropy(
            training.states(self.model, batch)[scored], self.model.shared.weight, batch.labels[scored]
        )

    def held_out_bits(self) -> float:
        """Bits per held-out character of hidden spans, the shares of the sources applied."""
        text = data.held_out(self.work)
        hidden = figures.hide_text(text.texts, text.shares, with_sentinels(self.work), 8)
        return figures.bits_per_hidden_char(self._logits, hidden)["all"]

    def _logits(self, batch: Batch) -> Tensor:
        return training.states(self.model, batch) @ self.model.shared.weight.t()
