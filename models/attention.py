"""Training-only causal attention in bf16, by blocks of queries: about twice as fast as the CPU's fused kernel.

It knows a sliding window and attention sinks, which that kernel does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

IMPLEMENTATION = "blocked_bf16"
BLOCK = 128


def _blocks(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first key, first query, end) of every block: its queries see keys first key .. end, masked further."""
    starts = range(0, length, BLOCK)
    return [(max(0, start - window + 1) if window else 0, start, min(start + BLOCK, length)) for start in starts]


def _mask(low: int, start: int, stop: int, window: int | None, dtype: torch.dtype) -> Tensor:
    distance = torch.arange(start, stop)[:, None] - torch.arange(low, stop)
    hidden = (distance < 0) | (distance >= (window or stop + 1))
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


class _Causal(torch.autograd.Function):
    """softmax(q k^T + mask, with a sink) v over [heads, length, width]; `q` is already scaled, `sinks` is [heads]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int | None) -> Tensor:
        out = torch.empty(*q.shape[:2], v.shape[2], dtype=v.dtype)
        kept = []
        for low, start, stop in _blocks(q.shape[1], window):
            scores = torch.bmm(q[:, start:stop], k[:, low:stop].transpose(1, 2))
            scores += _mask(low, start, stop, window, q.dtype)
            if sinks is not None:
                scores = torch.cat([scores, sinks[:, None, None].expand(-1, stop - start, 1)], -1)
            kept.append(torch.softmax(scores, -1))
            out[:, start:stop] = torch.bmm(kept[-1][:, :, : stop - low], v[:, low:stop])
        ctx.save_for_backward(q, k, v, *kept)
        ctx.window, ctx.has_sinks = window, sinks is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        q, k, v, *kept = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        grad_sinks = q.new_zeros(len(q)) if ctx.has_sinks else None
        for (low, start, stop), share in zip(_blocks(q.shape[1], ctx.window), kept, strict=True):
            grad = grads[0][:, start:stop].contiguous()
            grad_share = torch.bmm(grad, v[:, low:stop].transpose(1, 2))
            if grad_sinks is not None:
                grad_share = torch.nn.functional.pad(grad_share, (0, 1))
            back = torch._softmax_backward_data(grad_share, share, -1, share.dtype)
            if grad_sinks is not None:
                grad_sinks += back[:, :, -1].sum(1)
            back, share = back[:, :, : stop - low], share[:, :, : stop - low]
            grad_q[:, start:stop] = torch.bmm(back, k[:, low:stop])
            grad_k[:, low:stop] += torch.bmm(back.transpose(1, 2), q[:, start:stop])
            grad_v[:, low:stop] += torch.bmm(share.transpose(1, 2), grad)
        return grad_q, grad_k, grad_v, grad_sinks, None


def blocked_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: query [batch, heads, length, width]; causal, no padding, no cache.

    `s_aux` are gpt-oss's sinks, one logit per head that takes a share of the attention and gives nothing.
    """
    batch, heads, length, _width = query.shape
    repeat = heads // key.shape[1]
    flat = [
        one.repeat_interleave(repeat if number else 1, 1).to(torch.bfloat16).flatten(0, 1)
        for number, one in enumerate((query * scaling, key, value))
    ]
    sinks = None if s_aux is None else s_aux.to(torch.bfloat16).repeat(batch)
    out = _Causal.apply(*flat, sinks, sliding_window)
    return out.view(batch, heads, length, -1).transpose(1, 2).contiguous().to(query.dtype), None


def register() -> None:
    """Make the training attention selectable by name."""
    AttentionInterface.register(IMPLEMENTATION, blocked_attention)
