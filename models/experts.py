"""Training-only experts forward, and the per-layer load balance that keeps every expert in use.

transformers' own experts functions are made for inference or for a GPU; on a CPU core, sorting the tokens by expert
and multiplying in bf16 trains several times faster. transformers' auxiliary loss sums the counts over all layers, so
one layer may collapse while another hides it; here every layer is balanced by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "sorted_bf16"
# Few different row counts: oneDNN prepares a matrix product once per shape, and experts would bring new ones forever.
ROW_BLOCK = 32


class GroupedMatmul(torch.autograd.Function):
    """Rows of `x`, grouped by expert, times that expert's matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:
        """x [rows, in], weight [experts, in, out] (any strides), bounds[e]:bounds[e + 1] are expert e's rows."""
        out = x.new_empty(x.shape[0], weight.shape[2])
        for expert, matrix in enumerate(weight):
            rows = slice(bounds[expert], bounds[expert + 1])
            torch.mm(x[rows], matrix, out=out[rows])
        ctx.save_for_backward(x, weight)
        ctx.bounds = bounds
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        for expert, matrix in enumerate(weight):
            rows = slice(ctx.bounds[expert], ctx.bounds[expert + 1])
            torch.mm(grad[rows], matrix.t(), out=grad_x[rows])
            if grad_weight[expert].is_contiguous():
                torch.mm(x[rows].t(), grad[rows], out=grad_weight[expert])
            else:
                torch.mm(grad[rows].t(), x[rows], out=grad_weight[expert].t())
        return grad_x, grad_weight, None


@dataclass(frozen=True)
class Places:
    """Where (token, choice) pairs go when sorted by expert, every expert's rows padded to a multiple of ROW_BLOCK.

    `bounds` [experts + 1]; `of_pair` [pairs]: row of each pair; `pair_at` [rows]: pair in each row, or the
    number of pairs for padding.
    """

    bounds: list[int]
    of_pair: Tensor
    pair_at: Tensor

    @staticmethod
    def of(ids: Tensor, num_experts: int) -> Places:
        counts = torch.bincount(ids, minlength=num_experts)
        padded = (counts + ROW_BLOCK - 1) // ROW_BLOCK * ROW_BLOCK
        starts = padded.cumsum(0) - padded
        order = torch.argsort(ids, stable=True)
        of_pair = torch.empty_like(order)
        of_pair[order] = torch.arange(len(ids)) + (starts - (counts.cumsum(0) - counts))[ids[order]]
        pair_at = torch.full((int(padded.sum()),), len(ids))
        pair_at[of_pair] = torch.arange(len(ids))
        return Places([*starts.tolist(), int(padded.sum())], of_pair, pair_at)


def _with_zero_row(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


class Dispatch(torch.autograd.Function):
    """Copy every token to its k experts' rows; the gradient is a gather instead of a slow scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places, top_k: int) -> Tensor:
        ctx.places, ctx.top_k = places, top_k
        return _with_zero_row(x).index_select(0, places.pair_at // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        back = grads[0].index_select(0, ctx.places.of_pair)
        return back.view(-1, ctx.top_k, back.shape[1]).sum(1), None, None


class Collect(torch.autograd.Function):
    """From the experts' rows back to pairs in token order."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return y.index_select(0, places.of_pair)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _with_zero_row(grads[0]).index_select(0, ctx.places.pair_at), None


def sorted_experts_forward(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts function for ALL_EXPERTS_FUNCTIONS: hidden [tokens, width], index and weights [tokens, k] -> hidden."""
    num_tokens, top_k = top_k_index.shape
    ids = top_k_index.reshape(-1)
    places = Places.of(ids, self.num_experts)
    expert_at = torch.cat([ids, ids.new_zeros(1)])[places.pair_at] if self.has_bias else ids

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrices = weight.to(torch.bfloat16)
        out = GroupedMatmul.apply(x, matrices if self.is_transposed else matrices.transpose(1, 2), places.bounds)
        return out if bias is None else out + bias.to(torch.bfloat16)[expert_at]

    with torch.autocast("cpu", enabled=False):
        x = Dispatch.apply(hidden.to(torch.bfloat16), places, top_k)
        up = linear(x, self.gate_up_proj, self.gate_up_proj_bias if self.has_bias else None)
        out = linear(self._apply_gate(up), self.down_proj, self.down_proj_bias if self.has_bias else None)
        out = Collect.apply(out, places).view(num_tokens, top_k, -1)
        return torch.einsum("nkd,nk->nd", out, top_k_weights.to(out.dtype)).to(hidden.dtype)


def register() -> None:
    """Make the training forward selectable: `config._experts_implementation = IMPLEMENTATION`."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, sorted_experts_forward)


def routers_of(model: nn.Module) -> list[Any]:
    """The routers of a model, one per MoE layer, in order."""
    return [one for one in model.modules() if type(one).__name__.lower().endswith("topkrouter")]


class RouterTap:
    """Listens to every router of a model: logits and choices since the last `clear`, one entry per MoE layer.

    What it heard keeps the graph of that forward alive: clear it every step, and call `close` when done.
    """

    def __init__(self, model: nn.Module) -> None:
        self.logits: list[Tensor] = []
        self.ids: list[Tensor] = []
        self.hooks: list[RemovableHandle] = []
        for router in routers_of(model):
            self.hooks.append(router.register_forward_hook(self._listen))

    def _listen(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self.logits.append(output[0])
        self.ids.append(output[2])

    def close(self) -> None:
        """Stop listening and forget."""
        for hook in self.hooks:
            hook.remove()
        self.clear()

    def clear(self) -> None:
        """Forget the last forward."""
        self.logits, self.ids = [], []

    def counts(self) -> Tensor:
        """How many (token, choice) pairs each expert got: [layers, experts]; [0, 0] of a dense model."""
        if not self.logits:
            return torch.zeros(0, 0)
        width = self.logits[0].shape[-1]
        return torch.stack([torch.bincount(ids.reshape(-1), minlength=width) for ids in self.ids])

    def balance_loss(self, sigmoid: bool, unit_logits: bool = False) -> Tensor:
        """Mean over layers of `experts * sum(load share * mean score)`: 1 when a layer is balanced, more when not.

        0 of a dense model. With `unit_logits`, of logits brought to a standard deviation of 1: a top-1 router then
        cannot please it by making all scores alike, which leaves the load of the best one as it was.
        """
        losses = []
        for logits, counts in zip(self.logits, self.counts(), strict=True):
            wide = logits.float() / (logits.float().std() + 1e-6) if unit_logits else logits.float()
            scores = wide.sigmoid() if sigmoid else wide.softmax(-1)
            scores = scores / scores.sum(-1, keepdim=True)
            losses.append(len(counts) * (counts / counts.sum() * scores.mean(0)).sum())
        return torch.stack(losses).mean() if losses else torch.zeros(())
