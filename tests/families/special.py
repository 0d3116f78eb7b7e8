"""The few fields that the rules of shrink.py do not reach, by model type: what would stay large, or contradict."""

from typing import Any

from foreroute.model.adapters.registry import REFUSED

_HYBRID = ["linear_attention", "full_attention"] * 2
_ONE_DENSE = ["dense", "sparse", "sparse", "sparse"]

SPECIAL: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": _ONE_DENSE},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": _ONE_DENSE},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]},
        "moe_intermediate_size": [48, 48],
    },
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
    "doge": {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 4},
    "dots1": {"n_shared_experts": 1},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 48},
    "glm5_next_text": {"index_kpool": 4, "mlp_layer_types": _ONE_DENSE},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}},
    # Layers 2 and 3 of six are passed three times.
    "inkling2_loop_text": {
        "num_hidden_layers": 6,
        "n_layers_per_attn_res_block": 2,
        "loop_layer_index_start": 2,
        "loop_layer_index_end": 4,
        "loop_gate_rank": 8,
    },
    "kimi_linear": {"layer_types": _HYBRID},
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
    # Of 12 experts that a token chooses 4 from, 4 have no weights.
    "longcat_flash": {
        "num_layers": 4,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 48,
        "zero_expert_num": 4,
        "moe_topk": 4,
        "head_dim": 16,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "step3p5": {
        "share_expert_dim": 48,
        "sliding_window": 8,
        "mlp_layer_types": _ONE_DENSE,
        "swiglu_limits": [None, None, 0.5, 0.5],
    },
    "zaya": {"num_experts_per_tok": 1},
}

_INKLING2_LOOP = (
    "its experts are published as NVFP4 and MXFP8 with scales that only transformers' own loader reads, and it passes "
    "its middle layers several times for each token"
)

# Why a model type cannot work, each of them refused before work starts (test_families.py).
CANNOT: dict[str, str] = {
    **REFUSED,
    "diffusion_gemma": "it writes by diffusion, many tokens at a time: not a causal language model",
    "ernie4_5_vl_moe": "its text and vision experts are stored as one and split while loading",
    "inkling2_loop": _INKLING2_LOOP,
    "inkling2_loop_text": _INKLING2_LOOP,
    "openai_privacy_filter": "a token classifier: it writes no text",
    "qwen3_omni_moe": "several models in one; its thinker is a model type of its own",
}

# Of these, those that have no class which writes text token by token.
WRITE_NO_TEXT = frozenset({"diffusion_gemma", "openai_privacy_filter"})

# Model types that the gate does not run, with the reason; their text parts are of families that it does, or fail
# in transformers itself.
UNTESTED: dict[str, str] = {
    "dots3_note": "its per-layer sizes go by the published layer numbers; its text part is tested as dots3_note_text",
    "inkling_mm_model": "its vision tower cannot be made small by these rules; its text part is tested as inkling_text",
    "qwen3_omni_moe_thinker": "transformers' own model fails on text alone: its config lacks vision_start_token_id",
}

# Exact, but nothing is guessed, with the reason.
UNGUESSED: dict[str, str] = {
    "muse_spark": "each expert ends in a norm: the family's own code computes them, a layer at a time",
}

# Blocks that route in themselves, in some transformers: no router's outputs cross, so that nothing is guessed.
ROUTE_THEMSELVES: dict[str, str] = {"jamba": "with transformers 5.17, whose block takes the top k itself"}

# The server computes one request at a time: attention of other kinds (indexed, compressed), positions that depend on
# what is computed at once, or caches of a class of their own.
ONE_ROW = frozenset({
    "axk2", "deepseek_v32", "deepseek_v4", "dots3_note_text", "glm5_next", "glm_moe_dsa", "hy_v4", "hy_v4_vl",
    "llama4", "llama4_text", "minimax", "mistral_large4", "qwen4_exp", "qwen4_exp_text", "unlimited_ocr",
})  # fmt: skip

# It computes one prompt at a time, though several answers. Of muse_spark the experts are computed by the family's own
# code, which takes padding for tokens; the others have states, which padding would change.
NOT_PADDED = frozenset({
    "bailing_hybrid", "granitemoehybrid", "inkling2", "inkling2_text", "inkling_text", "jamba", "kimi_linear",
    "lara_mini", "lfm2_moe", "muse_spark", "nemotron_h", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "zaya",
})  # fmt: skip

# Of these, those whose code drops a state when several tokens follow: a prompt is computed at once.
AT_ONCE = frozenset({"jamba"})
