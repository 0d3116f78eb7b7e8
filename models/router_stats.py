"""Is the routing balanced, and does it follow the text? Per-layer load, entropy and reuse between neighbours."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.experts import RouterTap


@dataclass(frozen=True)
class LayerStats:
    """One MoE layer over many tokens. `max_over_mean` and `entropy` (share of uniform) describe the load of experts;
    `reuse` is the share of a token's experts that the token before it used too; chance is k / experts."""

    layer: int
    max_over_mean: float
    entropy: float
    dead_experts: int
    reuse: float


@torch.no_grad()
def router_stats(model: PreTrainedModel, rows: Tensor, batch: int = 4) -> list[LayerStats]:
    """Statistics over token rows [rows, length]."""
    tap = RouterTap(model)
    counts: Tensor | None = None
    reuse: list[Tensor] = []
    for ids in rows.split(batch):
        tap.clear()
        model(input_ids=ids, use_cache=False)
        counts = tap.counts() if counts is None else counts + tap.counts()
        chosen = torch.stack(tap.ids).view(len(tap.ids), *ids.shape, -1)
        same = (chosen[:, :, 1:, :, None] == chosen[:, :, :-1, None, :]).any(-1)
        reuse.append(same.float().mean((1, 2, 3)))
    tap.close()
    assert counts is not None
    return layer_stats(counts, torch.stack(reuse).mean(0))


def layer_stats(counts: Tensor, reuse: Tensor) -> list[LayerStats]:
    """The statistics of counts [layers, experts] and reuse [layers]."""
    load = counts / counts.sum(1, keepdim=True)
    entropy = -(load * load.clamp_min(1e-12).log()).sum(1) / math.log(load.shape[1])
    return [
        LayerStats(layer, (load[layer].max() * load.shape[1]).item(), entropy[layer].item(),
                   int((counts[layer] == 0).sum()), reuse[layer].item())
        for layer in range(len(load))
    ]  # fmt: skip


def as_records(stats: list[LayerStats]) -> list[dict[str, float]]:
    """The statistics as plain records for JSON."""
    return [asdict(one) for one in stats]
