"""Cross-entropy together with the output projection, without a full matrix of fp32 logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # rows whose fp32 logits stay in the cache


# From log-probabilities [chunk, vocabulary], which it may overwrite, and their rows: summed loss, and its gradient.
Target = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class _ProjectedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Target) -> Tensor:
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = torch.mm(hidden[rows], weight.t()).float()
            loss, grad = target(torch.log_softmax(logits, -1), rows)
            total += loss
            narrow = grad.div_(len(hidden)).to(hidden.dtype)
            grad_hidden[rows] = torch.mm(narrow, weight)
            grad_weight += torch.mm(narrow.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0].to(grad_hidden.dtype), grad_weight * grads[0].to(grad_weight.dtype), None


def projected_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of hidden [rows, width] @ weight.T [width, vocabulary] against labels [rows], in fp32.

    The gradients are made in the forward pass, chunk by chunk; they are right for a loss used once.
    """

    def target(logs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        picked = labels[rows, None]
        loss = -logs.gather(1, picked).sum()
        grad = logs.exp_()
        return loss, grad.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=grad.dtype))

    return _ProjectedCrossEntropy.apply(hidden, weight, target)


def projected_distillation(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """The same against a teacher's distribution, teacher_hidden [rows, its width] @ teacher_weight.T, in fp32.

    Its least value is the teacher's mean entropy; the difference is the Kullback-Leibler divergence.
    """

    def target(logs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        shares = torch.mm(teacher_hidden[rows], teacher_weight.t()).float().softmax(-1)
        return -(shares * logs).sum(), logs.exp_().sub_(shares)

    return _ProjectedCrossEntropy.apply(hidden, weight, target)
