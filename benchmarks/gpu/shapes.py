"""Models of real shapes whose weights are made on the spot: dense ones on the device, experts in an arena."""

from dataclasses import dataclass
from typing import Any

import foreroute  # noqa: F401  before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch

from foreroute.checkpoint.index import CheckpointIndex
from foreroute.checkpoint.layouts import ExpertLayout, ExpertTable, LayerExperts, Part
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.loading.expert_math import describe_math
from foreroute.model.blocks import MoeLayer, probe
from foreroute.model.build.skeleton import offloaded_modules, swapped_experts
from foreroute.model.experts import is_experts_class
from foreroute.transfer.memory import Arena

_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 64


def qwen3_30b_a3b(num_layers: int = 48) -> Any:
    """Qwen3-30B-A3B's shape: 48 layers, 128 experts, top-8."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=num_layers, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        intermediate_size=6144, max_position_embeddings=4096, norm_topk_prob=True,
    )  # fmt: skip


def gpt_oss_20b(num_layers: int = 24) -> Any:
    """gpt-oss-20b's shape: 24 layers, 32 experts, top-4, gates with biases."""
    from transformers import GptOssConfig

    return GptOssConfig(
        vocab_size=201088, hidden_size=2880, num_hidden_layers=num_layers, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4, intermediate_size=2880,
        max_position_embeddings=4096,
        layer_types=["sliding_attention" if at % 2 == 0 else "full_attention" for at in range(num_layers)],
    )  # fmt: skip


def tiny() -> Any:
    """A shape for trials of this program without a GPU."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=32, num_experts_per_tok=4, moe_intermediate_size=32, intermediate_size=32,
        max_position_embeddings=256,
    )  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model without experts, and its experts in host memory."""

    name: str
    model: Any
    layers: list[MoeLayer]
    table: ExpertTable
    arena: Arena
    math: list[ExpertMath]

    @property
    def token_demand(self) -> int:
        """Experts that one token uses, over all layers."""
        return sum(layer.top_k for layer in self.layers)


def make_shape(name: str, config: Any, dtype: torch.dtype, device: torch.device) -> Shape:
    """Random dense weights on the device, random experts in pinned host memory."""
    from transformers import AutoModelForCausalLM

    config._experts_implementation = "eager"
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config, dtype=dtype)
    classes = frozenset(type(module) for module in outline.modules() if is_experts_class(type(module)))
    with swapped_experts(classes), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    layers = probe(model, offloaded_modules(model))
    table = ExpertTable(tuple(_experts_of(layer, dtype) for layer in layers), CheckpointIndex.__new__(CheckpointIndex))
    math = [describe_math(layer.experts) for layer in layers]
    known = [entry for entry in math if entry is not None]
    assert len(known) == len(layers), "both shapes have maths that is known"
    arena = Arena(table.total_slots, table.slot_bytes, is_pinned=device.type == "cuda")
    _fill(arena, table, dtype, device)
    return Shape(name, model, layers, table, arena, known)


def _experts_of(layer: MoeLayer, dtype: torch.dtype) -> LayerExperts:
    parts, offset = [], 0
    for parameter in layer.experts.expert_parameters:
        nbytes = torch.Size(parameter.shape).numel() * dtype.itemsize
        parts.append(Part(parameter.name, offset, nbytes, parameter.shape, _STORED[dtype]))
        offset = -(-(offset + nbytes) // _ALIGNMENT) * _ALIGNMENT
    return LayerExperts(layer.name, layer.experts.num_offloaded, ExpertLayout(tuple(parts)), ())


def _fill(arena: Arena, table: ExpertTable, dtype: torch.dtype, device: torch.device) -> None:
    """Small normal numbers everywhere: made on the device, which is the quicker of the two."""
    generator = torch.Generator(device).manual_seed(0)
    done = 0
    for layer in table.layers:
        numbers = layer.num_experts * arena.record_bytes // dtype.itemsize
        made = torch.randn(numbers, generator=generator, device=device, dtype=torch.float32).mul_(0.02).to(dtype)
        arena.tensor[done : done + layer.num_experts].view(-1).copy_(made.view(torch.uint8))
        done += layer.num_experts
