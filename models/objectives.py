"""What a training step scores: the next token against the text, or against another model's distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from foreroute.evals.text import bits_per_char
from models import attention, experts
from models.data import IGNORE, Rows, held_out_windows
from models.families import Recipe
from models.loss import projected_cross_entropy, projected_distillation

MODELS = Path(__file__).resolve().parent


class Objective(Protocol):
    """The loss of a part of a step, and the held-out figure that is followed in training."""

    def loss(self, step: int, part: int) -> Tensor:
        """Mean loss of this part of the step, in nats per scored token."""
        ...

    def held_out_bits(self) -> float:
        """Bits per held-out character."""
        ...


class NextToken:
    """Cross-entropy of the next token; with a teacher, against its distribution instead of the token that came."""

    def __init__(self, recipe: Recipe, work: Path, model: PreTrainedModel) -> None:
        self.recipe, self.work, self.model = recipe, work, model
        self.rows = Rows(work, recipe.seq_len, recipe.seed, recipe.text_share, recipe.kind_weights)
        self.teacher = load_teacher(MODELS / recipe.teacher) if recipe.teacher else None

    def loss(self, step: int, part: int) -> Tensor:
        """Mean loss of this part of the step, in nats per scored token."""
        ids, labels = self.rows.batch(step, part, self.recipe.rows)
        scored = labels.reshape(-1) != IGNORE
        states = _states(self.model, ids, scored)
        weight = self.model.lm_head.weight
        if self.teacher is None:
            return projected_cross_entropy(states, weight, labels.reshape(-1)[scored])
        with torch.no_grad():
            teacher_states = _states(self.teacher, ids, scored)
        return projected_distillation(states, weight, teacher_states, self.teacher.lm_head.weight)

    def held_out_bits(self) -> float:
        """Bits per held-out character, the shares of the sources applied."""
        return bits_per_char(self.model, held_out_windows(self.work, self.recipe.seq_len, 6))["all"]


def _states(model: PreTrainedModel, ids: Tensor, scored: Tensor) -> Tensor:
    """What `model` projects to logits, [scored tokens, width]."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])[scored]


def load_teacher(folder: Path) -> PreTrainedModel:
    """An exported model in bf16, with the fast training forward."""
    experts.register()
    attention.register()
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        experts_implementation=experts.IMPLEMENTATION,
        attn_implementation=attention.IMPLEMENTATION,
    ).eval()
