"""Muon for matrices and Adam for the rest, over flat shared memory so that several processes can split the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
ADAM_BETAS = (0.9, 0.95)
MUON_MOMENTUM = 0.95
WEIGHT_DECAY = 0.05


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of [count, rows, columns] near 1 by Newton-Schulz steps in bf16.

    Source: Jordan et al., Muon (2024); a quintic whose coefficients trade exactness for speed.
    """
    x = matrices.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2).contiguous() if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the flat buffers, and how it is updated."""

    name: str
    start: int
    shape: torch.Size
    muon: bool
    halves: int

    @property
    def stop(self) -> int:
        """First element after this parameter."""
        return self.start + self.shape.numel()


def layout(model: PreTrainedModel) -> list[Slot]:
    """Assign every parameter a place in the flat buffers and an optimiser."""
    slots, start = [], 0
    for name, parameter in model.named_parameters():
        plain = any(part in name for part in ("embed", "lm_head", "norm", "bias", "sinks", ".gate.weight", "router"))
        # T5's family calls its embeddings "shared".
        muon = parameter.ndim >= 2 and not plain and name != "shared.weight"
        # Gate and up, one above the other, are two matrices; gpt-oss interleaves them, which is left as one.
        halves = 2 if name.endswith("gate_up_proj") and model.config.model_type != "gpt_oss" else 1
        slots.append(Slot(name, start, parameter.shape, muon, halves))
        start += -(-parameter.numel() // 16) * 16
    return slots


class Buffers(Protocol):
    """The flat buffers of a training: [elements] each, `grads` [ranks, elements]."""

    params: Tensor
    weights: Tensor
    grads: Tensor
    first: Tensor
    second: Tensor


class FlatOptimizer:
    """Updates parameters slot by slot: the fp32 values, and the bf16 weights that the models compute with."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers

    @torch.no_grad()
    def update(self, slot: Slot, num_parts: int, step: int, lr: float) -> None:
        """Update one slot at learning rate `lr` from gradients summed over `num_parts`; `step` counts from 0."""
        here = slice(slot.start, slot.stop)
        grad = self.buffers.grads[:, here].float().sum(0) / num_parts
        param, first = self.buffers.params[here], self.buffers.first[here]
        if slot.muon:
            self._muon(slot, param, grad, first, lr)
        else:
            self._adam(param, grad, first, self.buffers.second[here], step, lr)
        self.buffers.weights[here] = param

    def _muon(self, slot: Slot, param: Tensor, grad: Tensor, momentum: Tensor, lr: float) -> None:
        momentum.lerp_(grad, 1 - MUON_MOMENTUM)
        ahead = grad.lerp(momentum, MUON_MOMENTUM)
        rows, columns = slot.shape[-2] // slot.halves, slot.shape[-1]
        update = orthogonalise(ahead.view(-1, rows, columns)).reshape(-1)
        param.mul_(1 - lr * WEIGHT_DECAY)
        # 0.2 * sqrt(larger side) gives a matrix the root mean square of an Adam update: one rate serves both.
        param.add_(update.float(), alpha=-lr * 0.2 * max(rows, columns) ** 0.5)

    def _adam(self, param: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: int, lr: float) -> None:
        first.lerp_(grad, 1 - ADAM_BETAS[0])
        second.lerp_(grad.square(), 1 - ADAM_BETAS[1])
        mean = first / (1 - ADAM_BETAS[0] ** (step + 1))
        scale = (second / (1 - ADAM_BETAS[1] ** (step + 1))).sqrt_().add_(1e-8)
        param.addcdiv_(mean, scale, value=-lr)
