"""Tiny models of the families that GGUF files are read of, with weights that every machine makes alike.

No setting has its class's default where it bears on the numbers, so that one that is not read shows. Weights take few
values, so that a file of them compresses.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tests.support.families import PAD_ID, VOCAB_SIZE

_LEVELS = np.array([-4, -1, 0, 2, 3], dtype=np.float32)
# Of 64 and 32, which whole blocks of Q8_0 divide.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "rms_norm_eps": 3e-6, "pad_token_id": PAD_ID,
    "bos_token_id": 257, "eos_token_id": 258, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
_LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 16.0,
    "beta_slow": 2.0,
}  # fmt: skip
# Widths of attention by low ranks, and of the experts beside it.
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 32, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 2, "intermediate_size": 96, "moe_intermediate_size": 32,
}  # fmt: skip
_LINEAR: dict[str, Any] = {
    "num_hidden_layers": 4, "head_dim": 16, "linear_conv_kernel_dim": 3, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
# What llama.cpp's converter makes of contexts of 96 and 48 tokens.
_LONGER = 1.0858417157905849
_EYE = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
        "num_position_embeddings": 4, "deepstack_visual_indexes": []}  # fmt: skip
_SCALES = {
    "embedding_multiplier": 1.5, "logits_scaling": 2.0, "residual_multiplier": 0.75, "attention_multiplier": 0.3,
}  # fmt: skip

# By name: transformers' model type, and its settings beside the common ones.
TINY: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {
        "head_dim": 32, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # Experts on a Llama 3: its frequencies are a tensor.
    "mixtral-llama3": ("mixtral", {
        "head_dim": 32, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": _LLAMA_3}),
    "qwen2moe": ("qwen2_moe", {
        "intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 6,
        "num_experts_per_tok": 3}),
    "qwen3moe": ("qwen3_moe", {
        "head_dim": 32, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 6,
        "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "qwen3moe-yarn": ("qwen3_moe", {
        "head_dim": 32, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 6,
        "num_experts_per_tok": 3, "norm_topk_prob": True, "rope_parameters": _YARN}),
    # With an eye, which the converter leaves out.
    "qwen3vlmoe": ("qwen3_vl_moe", {
        "head_dim": 32, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [6, 5, 5]}}),
    "gpt-oss": ("gpt_oss", {
        "head_dim": 32, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": 8, "rope_parameters": {**_YARN, "truncate": False}}),
    # What llama.cpp rounds in YaRN, and transformers does not, left out.
    "gpt-oss-plain": ("gpt_oss", {
        "head_dim": 32, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": 8}),
    "olmoe": ("olmoe", {
        "num_key_value_heads": 4, "intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 3,
        "rms_norm_eps": 1e-5}),
    "deepseek2": ("deepseek_v2", {
        **_MLA, "q_lora_rank": None, "routed_scaling_factor": 1.5}),
    "deepseek2-groups": ("deepseek_v2", {
        **_MLA, "routed_scaling_factor": 1.5, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    "deepseek3": ("deepseek_v3", {
        **_MLA, "routed_scaling_factor": 1.5, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
        "num_nextn_predict_layers": 0, "scoring_func": "sigmoid",
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    # GLM 4.7 Flash, which the converter calls deepseek2.
    "glm4moelite": ("glm4_moe_lite", {
        **_MLA, "routed_scaling_factor": 1.5, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "num_nextn_predict_layers": 0, "mlp_layer_types": ["dense", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    # Attends to 32 tokens at most, which an indexer chooses.
    "glm-dsa": ("glm_moe_dsa", {
        **_MLA, "routed_scaling_factor": 1.5, "norm_topk_prob": True, "index_topk": 32, "index_n_heads": 2,
        "index_head_dim": 32, "num_hidden_layers": 3, "indexer_types": ["full", "full", "shared"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    "solar-open": ("solar_open", {
        "head_dim": 32, "moe_intermediate_size": 32, "n_routed_experts": 6, "intermediate_size": 96,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True,
        "rope_parameters": {**_YARN, "partial_rotary_factor": 1.0}}),
    "glm4moe": ("glm4_moe", {
        "head_dim": 32, "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 6,
        "num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 1, "use_qk_norm": True,
        "attention_bias": True, "routed_scaling_factor": 1.5, "num_nextn_predict_layers": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}}),
    "granitemoe": ("granitemoe", {
        **_SCALES, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoeshared": ("granitemoeshared", {
        **_SCALES, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 64, "tie_word_embeddings": True}),
    "granitehybrid": ("granitemoehybrid", {
        **_SCALES, "num_hidden_layers": 3, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 64, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 4,
        "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2, "mamba_d_conv": 3,
        "mamba_chunk_size": 8}),
    "phimoe": ("phimoe", {
        "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True,
        "lm_head_bias": True,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 5000.0, "original_max_position_embeddings": 48,
            "long_factor": [1.0 + 0.25 * at for at in range(8)], "short_factor": [1.0 + 0.125 * at for at in range(8)],
            "short_mscale": _LONGER, "long_mscale": _LONGER}}),
    "minimax-m2": ("minimax_m2", {
        "head_dim": 32, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rotary_dim": 16, "scoring_func": "sigmoid",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}}),
    "ernie4_5-moe": ("ernie4_5_moe", {
        "intermediate_size": 128, "moe_intermediate_size": 32, "moe_num_experts": 6, "moe_k": 2,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_layer_interval": 1}),
    "hunyuan-moe": ("hunyuan_v1_moe", {
        "head_dim": 16, "intermediate_size": 32, "num_experts": 4, "moe_topk": [2, 2],
        "moe_intermediate_size": [32, 32], "num_shared_expert": [1, 1]}),
    "dots1": ("dots1", {
        "num_key_value_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 6,
        "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 1.5, "scoring_func": "sigmoid"}),
    "lfm2moe": ("lfm2_moe", {
        "num_hidden_layers": 3, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 6,
        "num_experts_per_tok": 2, "num_dense_layers": 1, "norm_eps": 3e-6, "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention", "conv"], "tie_word_embeddings": True}),
    "qwen3next": ("qwen3_next", {**_LINEAR, "intermediate_size": 96, "norm_topk_prob": True}),
    "qwen35moe": ("qwen3_5_moe_text", {
        **_LINEAR, "rope_parameters": {**_LINEAR["rope_parameters"], "mrope_section": [2, 1, 1]}}),
    # Values are narrower than keys; layers with a window have sinks, and twice as many heads of keys.
    "mimo2": ("mimo_v2_flash", {
        "num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"], "num_key_value_heads": 1, "head_dim": 32, "v_head_dim": 16,
        "sliding_window": 8, "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "routed_scaling_factor": 1.0, "attention_value_scale": 0.6, "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 70000.0, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}}}),
    # Heads of two widths, and no values of their own where they are wide.
    "gemma4": ("gemma4_text", {
        "num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "sliding_window": 8, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4,
        "top_k_experts": 2, "enable_moe_block": True, "final_logit_softcapping": 20.0, "hidden_size_per_layer_input": 0,
        "tie_word_embeddings": True, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 70000.0, "partial_rotary_factor": 0.25}}}),
    "jamba": ("jamba", {
        "num_hidden_layers": 4, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "attn_layer_period": 3, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 8, "mamba_d_conv": 3, "mamba_expand": 2, "mamba_dt_rank": 8, "use_mamba_kernels": False}),
    # Each layer is one mixer; experts have no gate.
    "nemotron_h_moe": ("nemotron_h", {
        "num_hidden_layers": None, "head_dim": 32,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention"],
        "intermediate_size": 96, "ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2,
        "conv_kernel": 3, "chunk_size": 8, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 64, "num_experts_per_tok": 2, "routed_scaling_factor": 1.5,
        "layer_norm_epsilon": 3e-6, "moe_latent_size": 32}),
    "exaone-moe": ("exaone_moe", {
        "num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4,
        "num_experts_per_tok": 2, "num_shared_experts": 2, "first_k_dense_replace": 1, "sliding_window": 8,
        "routed_scaling_factor": 1.5, "scoring_func": "sigmoid"}),
    "afmoe": ("afmoe", {
        "num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4,
        "num_experts_per_tok": 2, "num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 8,
        "route_scale": 1.5, "route_norm": True, "score_func": "sigmoid", "mup_enabled": True}),
}  # fmt: skip


def tiny_config(name: str) -> Any:
    """transformers' config of the tiny model `name`."""
    from transformers import AutoConfig

    model_type, own = TINY[name]
    settings = {**_COMMON, **own}
    if model_type == "qwen3_vl_moe":
        settings = {"text_config": settings, "vision_config": _EYE, "tie_word_embeddings": False}
    config = AutoConfig.for_model(model_type, **settings)
    config._experts_implementation = "eager"
    return config


def tiny_model(name: str) -> Any:
    """The tiny model `name` in fp32."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = tiny_config(name)
    auto_class = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = auto_class.from_config(config).float()
    with torch.no_grad():
        for tensor_name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(_weights(tensor_name, tuple(tensor.shape), TINY[name][0])))
    return model.eval()


def _weights(name: str, shape: tuple[int, ...], model_type: str) -> np.ndarray:
    # RandomState: its numbers are the same for all time.
    steps = _LEVELS[np.random.RandomState(zlib.crc32(name.encode())).randint(0, len(_LEVELS), shape)]
    if name.endswith("self_attn.q_norm.weight") and model_type == "gemma4_text":
        # Attention is not divided by its width there: as sharp, what is rounded would make another token.
        return (1 + steps / 16) / 4
    if ("norm" in name or name.endswith(("scale", "scalar"))) and len(shape) == 1:
        return 1 + steps / 16
    if len(shape) == 1:
        return steps / 16
    return steps / (8 if "embed" in name else 16)
