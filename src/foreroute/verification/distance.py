"""How far ggml's products are from torch's: the same tokens through both, and their logits compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median

import torch

from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.types import Progress
from foreroute.verification.transcript import Exercise, steps

# Rounding activations to 8 bits costs far less than this; a wrong scale or a wrong block costs far more. The median: a
# router with two experts as good as equal may choose the other one, which moves that token far.
MOST_KL = 0.02


@dataclass(frozen=True)
class Distance:
    """Of distributions of the next token, ggml's from torch's.

    steps: compared ones, prefills among them. same_top: those whose likeliest token is the same.
    median_kl, worst_kl: Kullback-Leibler divergence in nats, torch's distribution as the true one.
    """

    steps: int
    same_top: int
    median_kl: float
    worst_kl: float

    @property
    def agrees(self) -> bool:
        """Whether both compute the same model, rounded differently."""
        return self.median_kl <= MOST_KL


def shortened(exercises: Sequence[Exercise], num_steps: int) -> list[Exercise]:
    """The same prompts with `num_steps` in all, or one for each prompt."""
    share = ceil(num_steps / len(exercises))
    return [Exercise(one.prompt_ids, min(one.num_steps, share)) for one in exercises]


def logits_of(
    model: OffloadedModel,
    names: Sequence[str],
    exercises: Sequence[Exercise],
    fed: Sequence[Sequence[int]],
    progress: Progress,
) -> list[torch.Tensor]:
    """Each step's logits [vocabulary], in float32.

    Args:
        names: of the experts modules. fed: per exercise the tokens to continue with. progress: (steps done, all).
    """
    found: list[torch.Tensor] = []
    num_steps = sum(exercise.num_steps for exercise in exercises)
    for exercise, tokens in zip(exercises, fed, strict=True):
        for _ in steps(model, names, exercise, fed=tokens, on_logits=lambda row: found.append(row.float().clone())):
            progress(len(found), num_steps)
    return found


def distance(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> Distance:
    """Compare logits [vocabulary] step by step."""
    divergences = [divergence(left, right) for left, right in zip(ours, theirs, strict=True)]
    same_top = sum(int(left.argmax()) == int(right.argmax()) for left, right in zip(ours, theirs, strict=True))
    return Distance(len(divergences), same_top, median(divergences), max(divergences))


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Kullback-Leibler divergence in nats of softmax(ours) from softmax(theirs), logits [vocabulary]."""
    left, right = (torch.log_softmax(logits.double(), -1) for logits in (ours, theirs))
    return max(0.0, float((right.exp() * (right - left)).sum()))
