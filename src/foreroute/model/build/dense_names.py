"""Which dense weights of safetensors can be kept in blocks: those of plain linear layers and embeddings."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

# Last names of layers that decide between experts, which stay floats as in llama.cpp: a route is a matter of last bits.
_ROUTERS = frozenset({"gate", "router", "classifier", "shared_expert_gate"})
# Every type's blocks are whole multiples of this number of weights.
_LEAST_BLOCK = 32


@dataclass(frozen=True)
class DenseMatrices:
    """stored: by the model's name of a weight, its stored name. shapes: of each, [out, in]. embedding: the input's."""

    stored: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    embedding: str = ""


def dense_matrices(model: PreTrainedModel, placed: Mapping[str, str], num_experts: int) -> DenseMatrices:
    """Find the weights of `model` (on the meta device) that its linear layers and embeddings take from one tensor.

    Args:
        placed: stored names that become a tensor of the model unchanged, with its name there.
        num_experts: most of a layer; a linear layer with as many outputs is taken for a router.
    """
    stored_name = {target: name for name, target in placed.items()}
    stored: dict[str, str] = {}
    shapes: dict[str, tuple[int, int]] = {}
    embedding = ""
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if type(module) not in (nn.Linear, nn.Embedding) or weight not in stored_name:
            continue
        rows, columns = module.weight.shape
        if rows == num_experts or name.rpartition(".")[2] in _ROUTERS or columns % _LEAST_BLOCK:
            continue
        stored[weight], shapes[weight] = stored_name[weight], (rows, columns)
        if module is model.get_input_embeddings():
            embedding = weight
    return DenseMatrices(stored, shapes, embedding)
