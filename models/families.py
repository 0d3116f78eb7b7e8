"""The models that ship: their configurations and how each is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from models.data import KIND_WEIGHTS
from models.tokenizer import NUM_SENTINELS, VOCAB_SIZE

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 4,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}


def _tiny() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        **COMMON, hidden_size=192, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=48,
        num_experts=32, num_experts_per_tok=4, moe_intermediate_size=64, intermediate_size=384, norm_topk_prob=True,
    )  # fmt: skip


def _gpt_oss() -> PreTrainedConfig:
    return GptOssConfig(
        **COMMON, hidden_size=160, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, head_dim=40,
        num_local_experts=16, num_experts_per_tok=4, intermediate_size=64, sliding_window=128,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip


def _deepseek() -> PreTrainedConfig:
    return DeepseekV3Config(
        **COMMON, hidden_size=160, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=4,
        n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, n_shared_experts=1,
        moe_intermediate_size=64, intermediate_size=320, first_k_dense_replace=1, norm_topk_prob=True,
        routed_scaling_factor=1.0, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16,
        v_head_dim=40,
    )  # fmt: skip


def _draft() -> PreTrainedConfig:
    # Few wide layers: at this size a step's time is Python's, and that goes with the number of layers.
    return LlamaConfig(
        **COMMON, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        intermediate_size=768, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip


# A capacity that no row of training reaches: every token meets its expert.
_SWITCH: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE + NUM_SENTINELS, "d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 144, "num_layers": 6,
    "num_sparse_encoder_layers": 3, "num_decoder_layers": 6, "num_sparse_decoder_layers": 3, "num_experts": 16,
    "expert_capacity": 512, "router_jitter_noise": 0.0, "dropout_rate": 0.0, "pad_token_id": 0,
    "decoder_start_token_id": 0, "bos_token_id": 0, "eos_token_id": 4,
}  # fmt: skip


def _switch() -> PreTrainedConfig:
    return SwitchTransformersConfig(**_SWITCH)


@dataclass(frozen=True)
class Recipe:
    """How one shipped model is made. Steps count optimiser steps of `parts * rows * seq_len` tokens.

    `drafts_for` names the model that verifies what this one drafts. Of an encoder-decoder, `seq_len` counts both sides,
    and `tail_share` is the share of the text's parts whose hidden span is their end.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    model_class: type[PreTrainedModel]
    routing: str
    stable_steps: int
    decay_steps: int
    lr: float = 4e-3
    warmup_steps: int = 100
    balance: float = 0.05
    unit_logits: bool = False
    bias_rate: float = 0.0
    parts: int = 4
    rows: int = 4
    seq_len: int = 512
    text_share: float = 0.6
    kind_weights: Mapping[str, float] = field(default_factory=lambda: KIND_WEIGHTS)
    seed: int = 0
    drafts_for: str = ""
    tail_share: float = 0.0


# The smaller models have few minutes: they learn five kinds well and the others a little.
FEW_KINDS = {"add": 3.0, "calendar": 3.0, "sort": 2.0, "count": 2.0, "brackets": 2.0}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("foreroute-tiny", _tiny, Qwen3MoeForCausalLM, "softmax over 32 experts, then top-4", 3500, 700),
        Recipe(
            "foreroute-tiny-oss", _gpt_oss, GptOssForCausalLM, "top-4 of 16 experts, then softmax", 2000, 500,
            parts=2, text_share=0.25, warmup_steps=60, kind_weights=FEW_KINDS,
        ),
        Recipe(
            "foreroute-tiny-dsv3", _deepseek, DeepseekV3ForCausalLM,
            "sigmoid scores, correction bias, 2 of 4 groups, top-4 of 16 experts, one shared", 2000, 500,
            parts=2, text_share=0.25, warmup_steps=60, kind_weights=FEW_KINDS, balance=0.01, bias_rate=0.002,
        ),
        Recipe(
            "foreroute-tiny-switch", _switch, SwitchTransformersForConditionalGeneration,
            "softmax over 16 experts, then top-1, in every other layer of encoder and decoder", 500, 200,
            seq_len=359, text_share=0.6, tail_share=0.25, kind_weights=FEW_KINDS, balance=0.1, unit_logits=True,
        ),
        Recipe(
            "foreroute-tiny-draft", _draft, LlamaForCausalLM, "dense", 2300, 500, parts=2, drafts_for="foreroute-tiny",
        ),
    )
}  # fmt: skip


def recipe_of(name: str) -> Recipe:
    """The recipe of a folder: NAME, or NAME-seedN for the same with another seed."""
    base, _, seed = name.partition("-seed")
    return replace(RECIPES[base], name=name, seed=int(seed)) if seed else RECIPES[base]


def _smoke() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        **{**COMMON, "vocab_size": 1024}, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
        intermediate_size=128,
    )  # fmt: skip


def _smoke_draft() -> PreTrainedConfig:
    return LlamaConfig(
        **{**COMMON, "vocab_size": 1024}, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, intermediate_size=128,
    )  # fmt: skip


def _smoke_switch() -> PreTrainedConfig:
    small = {"d_model": 64, "d_ff": 32, "num_heads": 2, "num_experts": 4, "num_layers": 2, "num_decoder_layers": 2}
    return SwitchTransformersConfig(
        **{**_SWITCH, **small, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    )


_SMOKE: dict[str, Any] = {"warmup_steps": 10, "parts": 1, "rows": 2, "seq_len": 256}
SMOKE = Recipe("smoke", _smoke, Qwen3MoeForCausalLM, "softmax over 8 experts, then top-2", 140, 60, **_SMOKE)
SMOKE_DRAFT = Recipe("smoke-draft", _smoke_draft, LlamaForCausalLM, "dense", 50, 25, **_SMOKE)
SMOKE_SWITCH = Recipe(
    "smoke-switch", _smoke_switch, SwitchTransformersForConditionalGeneration, "top-1 of 4 experts", 40, 20, **_SMOKE
)
