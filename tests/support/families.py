"""Tiny configs of the seven families that the gates run on: three MoE layers or more, built from their config classes.

The token demand (layers x top-k) lies below a quarter of the experts, so that every budget of the gates is its own.
"""

from collections.abc import Callable
from typing import Any

# Bytes, and the tokenizer's three special tokens after them.
VOCAB_SIZE = 264
PAD_ID = 256
CONTEXT = 192

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": PAD_ID,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **_COMMON,
        num_hidden_layers=3,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=16,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[],
    )


def _olmoe() -> Any:
    from transformers import OlmoeConfig

    return OlmoeConfig(
        **_COMMON,
        num_hidden_layers=4,
        intermediate_size=32,
        num_experts=12,
        num_experts_per_tok=2,
        norm_topk_prob=False,
    )


def _mixtral() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        **_COMMON, num_hidden_layers=5, head_dim=16, intermediate_size=48, num_local_experts=10, num_experts_per_tok=2
    )


def _deepseek_v2() -> Any:
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        **{**_COMMON, "num_key_value_heads": 4},
        num_hidden_layers=4,
        first_k_dense_replace=1,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=3,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.0,
        kv_lora_rank=32,
        q_lora_rank=48,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
    )


def _deepseek_v3() -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        **{**_COMMON, "num_key_value_heads": 4},
        num_hidden_layers=4,
        first_k_dense_replace=1,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        kv_lora_rank=32,
        q_lora_rank=48,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
    )


def _glm4_moe() -> Any:
    from transformers import Glm4MoeConfig

    return Glm4MoeConfig(
        **_COMMON,
        num_hidden_layers=4,
        head_dim=16,
        first_k_dense_replace=1,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        use_qk_norm=True,
    )


def _gpt_oss() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(
        **_COMMON,
        num_hidden_layers=4,
        head_dim=16,
        intermediate_size=32,
        num_local_experts=12,
        num_experts_per_tok=2,
        # Shorter than the prompts and what is generated, so that the window slides.
        sliding_window=8,
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "mixtral": _mixtral,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
}
