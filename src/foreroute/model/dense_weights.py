"""A model's dense weights: torch's parameters, and the matrices that stay in blocks, which are none."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from foreroute.kernels.ggml.linear import BlockEmbedding, BlockLinear


def dense_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every dense weight of `model` with its name, each memory once; blocks are uint8 [rows, bytes of a row]."""
    yield from model.named_parameters()
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, BlockLinear | BlockEmbedding) and id(module.matrix) not in seen:
            seen.add(id(module.matrix))  # a tied head shares the embedding's
            yield f"{name}.weight", module.matrix.blocks


def dense_nbytes(model: PreTrainedModel) -> int:
    """Bytes of those."""
    return sum(tensor.nbytes for _, tensor in dense_weights(model))
