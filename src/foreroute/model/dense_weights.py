"""A model's dense weights: torch's parameters, and the matrices that stay in blocks, which are none."""

from collections.abc import Iterator
from typing import Any

import torch

from foreroute.kernels.ggml.linear import BlockEmbedding, BlockLinear


def dense_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every dense weight of `model` with its name, each memory once; blocks are uint8 [rows, bytes of a row]."""
    yield from model.named_parameters()
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, BlockLinear | BlockEmbedding) and id(module.matrix) not in seen:
            seen.add(id(module.matrix))  # a tied head shares the embedding's
            yield f"{name}.weight", module.matrix.blocks


def dense_nbytes(model: Any) -> int:
    """Bytes of those."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in dense_weights(model))
