"""The training form of a Switch Transformer: experts stacked, one forward in bf16, and the way to transformers.

transformers' own forward loops over experts that are modules of their own, and adds masks and position biases in every
layer. Here the experts of a layer are two tensors, which the sorted product and the optimiser take at once, and the
biases are made once. Queries are scaled by a power of two that transformers has not: `published` folds it into them,
which loses no bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers import PreTrainedConfig, SwitchTransformersForConditionalGeneration

from models.experts import Collect, Dispatch, GroupedMatmul, Places
from models.seq2seq.rows import Batch

INITIAL_STD = 0.02
# A router starts with logits of about 1: near-uniform shares of one expert teach it nothing, and hide its collapse.
ROUTER_STD = 0.1


class StackedTop1TopKRouter(nn.Module):
    """Top-1 router over tokens [tokens, width], in fp32: logits, the chosen one's probability, its id [tokens, 1]."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.classifier = nn.Linear(config.d_model, config.num_experts, bias=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [tokens, experts], probability and expert id [tokens, 1]."""
        logits = linear(hidden.float(), self.classifier.weight.float())
        probability, ids = logits.softmax(-1).max(-1, keepdim=True)
        return logits, probability, ids


class StackedExperts(nn.Module):
    """Two-matrix ReLU experts: wi [experts, d_ff, width], wo [experts, width, d_ff]."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.wi = nn.Parameter(torch.empty(config.num_experts, config.d_ff, config.d_model))
        self.wo = nn.Parameter(torch.empty(config.num_experts, config.d_model, config.d_ff))

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Every token of [tokens, width] through its expert of `ids` [tokens]."""
        places = Places.of(ids, len(self.wi))
        x = Dispatch.apply(hidden, places, 1)
        up = GroupedMatmul.apply(x, self.wi.transpose(1, 2), places.bounds).relu()
        return Collect.apply(GroupedMatmul.apply(up, self.wo.transpose(1, 2), places.bounds), places)


def query_scale(config: PreTrainedConfig) -> float:
    """The power of two nearest to 1 / sqrt(width of a head)."""
    return 2.0 ** -round(math.log2(config.d_kv) / 2)


def build(config: PreTrainedConfig) -> SwitchTransformersForConditionalGeneration:
    """A fresh model in its training form, which `states` runs: small weights, as the other recipes start."""
    model = SwitchTransformersForConditionalGeneration._from_config(config)
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            if block.is_sparse:
                block.layer[-1].mlp.router = StackedTop1TopKRouter(config)
                block.layer[-1].mlp.experts = StackedExperts(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=ROUTER_STD if "router" in name else INITIAL_STD)
    # transformers divides the states by sqrt(width) before tied embeddings project them; this undoes it.
    nn.init.constant_(model.decoder.final_layer_norm.weight, config.d_model**0.5)
    return model


@torch.no_grad()
def published(model: SwitchTransformersForConditionalGeneration) -> SwitchTransformersForConditionalGeneration:
    """transformers' form of a trained model, in its dtype."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("Attention.q.weight"):
            state[name] = tensor * query_scale(model.config)
        elif ".experts." in name:
            stem, which = name.rsplit(".", 1)
            state.update({f"{stem}.expert_{number}.{which}.weight": one.clone() for number, one in enumerate(tensor)})
        else:
            state[name] = tensor
    made = SwitchTransformersForConditionalGeneration._from_config(model.config, dtype=model.shared.weight.dtype)
    made.load_state_dict(state)
    return made.eval()


def _norm(module: Any, hidden: Tensor) -> Tensor:
    return rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)


def _attend(module: Any, hidden: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of hidden [rows, length, width] over memory; bias [rows or 1, heads or 1, length, keys]."""
    rows, length, _ = hidden.shape
    scale = query_scale(module.config)
    query, key, value = (
        linear(states, part.weight).view(rows, -1, module.n_heads, module.key_value_proj_dim).transpose(1, 2)
        for states, part in ((hidden * scale, module.q), (memory, module.k), (memory, module.v))
    )
    scores = torch.matmul(query, key.transpose(2, 3))
    mixed = torch.matmul((scores if bias is None else scores + bias).softmax(-1), value)
    return linear(mixed.transpose(1, 2).reshape(rows, length, -1), module.o.weight)


def _feed_forward(module: Any, hidden: Tensor, kept: Tensor | None) -> Tensor:
    if hasattr(module, "wi"):
        return linear(linear(hidden, module.wi.weight).relu(), module.wo.weight)
    flat = hidden.reshape(-1, hidden.shape[-1])
    tokens = flat if kept is None else flat[kept.reshape(-1)]
    _, probability, ids = module.router(tokens)
    out = module.experts(tokens, ids[:, 0]) * probability.to(hidden.dtype)
    if kept is not None:
        out = torch.zeros_like(flat).index_put((kept.reshape(-1).nonzero()[:, 0],), out)
    return out.view_as(hidden)


def _hidden(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask`, minus infinity elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


def states(model: SwitchTransformersForConditionalGeneration, batch: Batch) -> Tensor:
    """What the training form projects to logits, [rows, decoder length, width]; padding meets no router."""
    memory = model.shared(batch.ids)
    length, dtype = batch.ids.shape[1], memory.dtype
    bias = model.encoder.block[0].layer[0].SelfAttention.compute_bias(length, length)
    seen = None if batch.kept is None else _hidden(batch.kept, dtype)[:, None, None]
    bias = bias if seen is None else bias + seen
    for block in model.encoder.block:
        attention, feed_forward = block.layer
        normed = _norm(attention.layer_norm, memory)
        memory = memory + _attend(attention.SelfAttention, normed, normed, bias)
        memory = memory + _feed_forward(feed_forward.mlp, _norm(feed_forward.layer_norm, memory), batch.kept)
    memory = _norm(model.encoder.final_layer_norm, memory)
    hidden = model.shared(batch.decoder_ids)
    length = hidden.shape[1]
    causal = _hidden(torch.ones(length, length, dtype=torch.bool).tril(), dtype)
    bias = model.decoder.block[0].layer[0].SelfAttention.compute_bias(length, length) + causal
    for block in model.decoder.block:
        attention, cross, feed_forward = block.layer
        normed = _norm(attention.layer_norm, hidden)
        hidden = hidden + _attend(attention.SelfAttention, normed, normed, bias)
        hidden = hidden + _attend(cross.EncDecAttention, _norm(cross.layer_norm, hidden), memory, seen)
        hidden = hidden + _feed_forward(feed_forward.mlp, _norm(feed_forward.layer_norm, hidden), batch.decoded)
    return _norm(model.decoder.final_layer_norm, hidden) * model.model_dim**-0.5
