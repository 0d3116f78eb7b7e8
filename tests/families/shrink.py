"""A tiny config of any family: its own config class with the few size fields made small, by name.

What follows from a size (lists per layer, head sizes) is left to the family's class, which works it out of the sizes.
"""

from typing import Any

from tests.families.special import SPECIAL

LAYERS = 4
EXPERTS = 8
TOP_K = 2
VOCAB_SIZE = 264
# No whole vectors: of what is left over torch rounds otherwise, alone or in company (kernels/torch/experts.py).
WIDTH = 48

# By field name; a field that a config class lacks is left out.
_SIZES: dict[str, int] = {
    "vocab_size": VOCAB_SIZE,
    "unpadded_vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size": 64,
    "n_embd": 64,
    "moe_hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 16,
    "swa_head_dim": 16,
    "global_head_dim": 16,
    "qk_head_dim": 32,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    "index_block_size": 8,
    "index_topk_blocks": 2,
    "rotary_dim": 16,
    "router_hidden_size": 16,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "max_position_embeddings": 256,
    "model_max_length": 256,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": LAYERS - 1,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "layer_group_size": 2,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_dt_rank": 8,
    "mamba_chunk_size": 16,
    "ssm_state_size": 16,
    "chunk_size": 16,
    "n_groups": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "hidden_size_per_layer_input": 16,
    "num_global_key_value_heads": 2,
    "hc_lowrank": 16,
    "d_rel": 8,
    "rel_extent": 64,
    "gated_norm_rank": 8,
    "ngram_vocab_size_base": 97,
    "split_ngram_parts": 4,
    "ple_embed_dim": 32,
    "canvas_length": 16,
    # Towers of multimodal models: never called here, but built.
    "depth": 1,
    "num_heads": 4,
    "embed_dim": 64,
    "text_hidden_size": 64,
    "out_hidden_size": 64,
    "projector_hidden_size": 64,
    "merged_hidden_size": 64,
}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_KS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_TOKENS = {"pad_token_id": 256, "bos_token_id": None, "eos_token_id": None}


def tiny_config(model_type: str) -> Any:
    """The config of a tiny model of this type, made by the family's own config class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**_small_fields(CONFIG_MAPPING[model_type]()))


def _small_fields(config: Any) -> dict[str, Any]:
    """The arguments that make a config of this kind small."""
    # As a dictionary: of a field that differs between layers some configs refuse the attribute.
    present = config.to_dict()
    sizes = {name for name, value in present.items() if type(value) is int and value > 0}
    fields: dict[str, Any] = {name: size for name, size in _SIZES.items() if name in sizes}
    fields |= {name: EXPERTS for name in _EXPERT_COUNTS if name in present}
    fields |= {name: TOP_K for name in _TOP_KS if name in present}
    fields |= {name: WIDTH for name in sizes if name.endswith("intermediate_size")}
    fields |= {name: token for name, token in _TOKENS.items() if name in present}
    if "head_dim" in present:
        is_whole = "qk_head_dim" in present and present["head_dim"] == present["qk_head_dim"]
        fields["head_dim"] = _SIZES["qk_head_dim" if is_whole else "head_dim"]
    if "tie_word_embeddings" in present:
        fields["tie_word_embeddings"] = False
    if "kv_lora_rank" in sizes and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]  # latent attention has as many
    for name in getattr(config, "sub_configs", None) or {}:
        inner = getattr(config, name, None)
        if inner is not None:
            fields[name] = {**_small_fields(inner), "model_type": inner.model_type}
    return fields | SPECIAL.get(config.model_type, {})
