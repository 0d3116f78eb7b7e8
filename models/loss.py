"""Cross-entropy together with the output projection, without a full matrix of fp32 logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # rows whose fp32 logits stay in the cache


class _ProjectedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(labels), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = torch.mm(hidden[rows], weight.t()).float()
            logs = torch.log_softmax(logits, -1)
            picked = labels[rows, None]
            total -= logs.gather(1, picked).sum()
            grad = logs.exp_()
            grad.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=grad.dtype))
            narrow = grad.div_(len(labels)).to(hidden.dtype)
            grad_hidden[rows] = torch.mm(narrow, weight)
            grad_weight += torch.mm(narrow.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total / len(labels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0].to(grad_hidden.dtype), grad_weight * grads[0].to(grad_weight.dtype), None


def projected_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of hidden [rows, width] @ weight.T [width, vocabulary] against labels [rows], in fp32.

    The gradients are made in the forward pass, chunk by chunk; they are right for a loss used once.
    """
    return _ProjectedCrossEntropy.apply(hidden, weight, labels)
