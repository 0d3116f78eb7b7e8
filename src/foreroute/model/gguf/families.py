"""What differs between llama.cpp's architectures and transformers' families, beyond names: a declaration for each.

Names come from the gguf package's own map (tensors.py), settings that all say alike from metadata.py. The facts here
are those of llama.cpp: what its converter does to a model's tensors and settings (conversion/), and what the graph of
an architecture does that no setting says (src/models/). tests/converted/test_architectures.py holds every one of them
against a model that llama.cpp's converter wrote.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from foreroute.model.gguf import changes
from foreroute.model.gguf.changes import TensorChange
from foreroute.model.gguf.metadata import SIGMOID, SOFTMAX, GgufMetadata


@dataclass(frozen=True)
class GgufFamily:
    """One architecture.

    model_type: transformers'. fixed: settings that its graph implies. more: settings that have to be worked out.
    always: what transformers' model does in any case, by the metadata's name.
    spellings: parts of parameters' names, as the gguf package's map spells them. changes: by the end of a parameter's
        name; the first one is taken, None is none.
    scores: kinds of router scores that the metadata may say. turns_in_part: positions may turn a part of a head.
    yarn: what transformers has with YaRN beside what is said. has_mscale: see `rope_parameters`.
    """

    model_type: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    more: Callable[[GgufMetadata], Mapping[str, Any]] = lambda metadata: {}
    spellings: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, TensorChange | None] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[int, ...] = (SOFTMAX,)
    turns_in_part: bool = False
    yarn: Mapping[str, Any] = field(default_factory=dict)
    has_mscale: bool = False


_PERMUTED = {"q_proj.weight": changes.QUERIES, "k_proj.weight": changes.KEYS, "q_proj.bias": changes.QUERIES,
             "k_proj.bias": changes.KEYS}  # fmt: skip
_NO_WINDOW: Mapping[str, Any] = {"sliding_window": None, "use_sliding_window": False}
_QWEN: Mapping[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": [], **_NO_WINDOW}


def _windows(metadata: GgufMetadata, every: int) -> dict[str, Any]:
    """Which layers have a window: as the pattern says, else all but each `every`-th."""
    pattern = metadata.get("attention.sliding_window_pattern", every)
    if not isinstance(pattern, list):
        pattern = [bool((layer + 1) % pattern) for layer in range(metadata.num_layers)]
    kinds = ("full_attention", "sliding_attention")
    return {"layer_types": [kinds[bool(is_window)] for is_window in pattern[: metadata.num_layers]]}


def _granite(metadata: GgufMetadata) -> Mapping[str, Any]:
    shared = metadata.get("expert_shared_feed_forward_length", 0)
    return {"model_type": "granitemoeshared", "shared_intermediate_size": shared} if shared else {}


def _granite_hybrid(metadata: GgufMetadata) -> Mapping[str, Any]:
    heads = metadata.must("ssm.time_step_rank")
    inner = metadata.must("ssm.inner_size")
    return {
        "layer_types": ["attention" if kv else "mamba" for kv in metadata.by_layer("attention.head_count_kv")],
        "position_embedding_type": "rope" if metadata.get("rope.scaling.finetuned", True) else None,
        "shared_intermediate_size": metadata.get("expert_shared_feed_forward_length", 0),
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // metadata.must("embedding_length"),
        "mamba_n_groups": metadata.must("ssm.group_count"),
        "mamba_d_state": metadata.must("ssm.state_size"),
        "mamba_d_conv": metadata.must("ssm.conv_kernel"),
        "mamba_conv_bias": metadata.has("ssm_conv1d.bias"),
        "mamba_proj_bias": metadata.has("ssm_in.bias"),
    }


def _gemma4(metadata: GgufMetadata) -> Mapping[str, Any]:
    found = _windows(metadata, 6)
    is_full = [kind == "full_attention" for kind in found["layer_types"]]
    if not any(is_full) or all(is_full) or isinstance(metadata.must("feed_forward_length"), list):
        raise metadata.refused("feed_forward_length", "or attention.sliding_window_pattern, which the family lacks")
    kv_heads = metadata.by_layer("attention.head_count_kv")
    width = metadata.must("attention.key_length")
    divisors = metadata.floats("rope_freqs.weight")
    # Dimensions that full attention does not turn are divided by 1e30.
    turned = sum(divisor == 1 for divisor in divisors)
    wide, narrow = is_full.index(True), is_full.index(False)
    return {
        **found,
        "head_dim": metadata.must("attention.key_length_swa"),
        "global_head_dim": width,
        "num_key_value_heads": kv_heads[narrow],
        "num_global_key_value_heads": kv_heads[wide],
        "attention_k_eq_v": f"blk.{wide}.attn_v.weight" not in metadata.index.tensors,
        "vocab_size_per_layer_input": metadata.index.shapes["token_embd.weight"][0],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": float(metadata.must("rope.freq_base_swa"))},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": float(metadata.must("rope.freq_base")),
                "partial_rotary_factor": turned / len(divisors),
            },
        },
    }


def _mimo2(metadata: GgufMetadata) -> Mapping[str, Any]:
    found = _windows(metadata, 6)
    kv_heads, width = metadata.by_layer("attention.head_count_kv"), metadata.must("attention.key_length")
    fewest = min(kv_heads)
    if any(
        heads != fewest * (1 + (kind != "full_attention"))
        for heads, kind in zip(kv_heads, found["layer_types"], strict=True)
    ):
        raise metadata.refused("attention.head_count_kv", "where layers with a window have twice as many")
    part = {"rope_type": "default", "partial_rotary_factor": metadata.must("rope.dimension_count") / width}
    theta = metadata.must("rope.freq_base")
    routed = [f"blk.{at}.ffn_gate_inp.weight" in metadata.index.tensors for at in range(metadata.num_layers)]
    return {
        **found,
        "head_dim": width,
        "v_head_dim": metadata.must("attention.value_length"),
        "num_key_value_heads": fewest,
        # Of tokens before this one; transformers counts this one.
        "sliding_window": metadata.must("attention.sliding_window") + 1,
        "mlp_layer_types": [("dense", "sparse")[is_routed] for is_routed in routed],
        "attention_value_scale": metadata.get("attention.value_scale", 1.0),
        "attention_bias": metadata.has("attn_q.bias"),
        "rope_parameters": {
            "full_attention": {**part, "rope_theta": theta},
            "sliding_attention": {**part, "rope_theta": metadata.get("rope.freq_base_swa", theta)},
        },
    }


def _jamba(metadata: GgufMetadata) -> Mapping[str, Any]:
    layers = range(metadata.num_layers)
    attention = [bool(heads) for heads in metadata.by_layer("attention.head_count_kv")]
    routed = [f"blk.{layer}.ffn_gate_inp.weight" in metadata.index.tensors for layer in layers]
    found: dict[str, Any] = {
        "mamba_d_state": metadata.must("ssm.state_size"),
        "mamba_d_conv": metadata.must("ssm.conv_kernel"),
        "mamba_expand": metadata.must("ssm.inner_size") // metadata.must("embedding_length"),
        "mamba_dt_rank": metadata.must("ssm.time_step_rank"),
        "mamba_conv_bias": metadata.has("ssm_conv1d.bias"),
        "mamba_proj_bias": metadata.has("ssm_in.bias"),
    }
    for name, chosen in (("attn", attention), ("expert", routed)):
        at = [layer for layer in layers if chosen[layer]]
        period = at[1] - at[0] if len(at) > 1 else len(layers)
        if not at or at != [*layers[at[0] :: period]] or at[0] >= period:
            raise metadata.refused("attention.head_count_kv", f"where {name} layers do not lie at equal distances")
        found |= {f"{name}_layer_period": period, f"{name}_layer_offset": at[0]}
    return found


def _nemotron(metadata: GgufMetadata) -> Mapping[str, Any]:
    heads = metadata.must("ssm.time_step_rank")
    widths, kv_heads = metadata.by_layer("feed_forward_length"), metadata.by_layer("attention.head_count_kv")
    kinds = {(True, False): "moe", (False, True): "full_attention", (False, False): "linear_attention"}
    return {
        "layers_block_type": [kinds[bool(w), bool(kv)] for w, kv in zip(widths, kv_heads, strict=True)],
        "intermediate_size": max(widths),
        "mamba_num_heads": heads,
        "mamba_head_dim": metadata.must("ssm.inner_size") // heads,
        "n_groups": metadata.must("ssm.group_count"),
        "ssm_state_size": metadata.must("ssm.state_size"),
        "conv_kernel": metadata.must("ssm.conv_kernel"),
        "use_conv_bias": metadata.has("ssm_conv1d.bias"),
        "use_bias": metadata.has("ssm_in.bias"),
        "mlp_bias": metadata.has("ffn_up_shexp.bias"),
        "attention_bias": metadata.has("attn_q.bias"),
    }


def _deepseek(metadata: GgufMetadata) -> Mapping[str, Any]:
    turned = metadata.must("rope.dimension_count")
    groups = metadata.get("expert_group_count", 1)
    found: dict[str, Any] = {
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": metadata.must("attention.key_length_mla") - turned,
        "num_key_value_heads": metadata.must("attention.head_count"),
        "q_lora_rank": metadata.get("attention.q_lora_rank"),
        "head_dim": turned,
    }
    # GLM 4.7 Flash does not say it; llama.cpp knows that model by its sizes. A bias of choice goes with no other.
    usual = SIGMOID if metadata.has("exp_probs_b.bias") else SOFTMAX
    if metadata.get("expert_gating_func", usual) == SIGMOID:
        return {**found, "model_type": "deepseek_v3"}
    if metadata.get("expert_weights_norm", False):
        raise metadata.refused("expert_weights_norm", "which transformers' DeepSeek-V2 does not do")
    return {**found, "topk_method": "group_limited_greedy" if groups > 1 else "greedy"}


def _glm_dsa(metadata: GgufMetadata) -> Mapping[str, Any]:
    turned, layers = metadata.must("rope.dimension_count"), range(metadata.num_layers)
    # Older files do not say which layers choose tokens anew; those have what that takes.
    full = metadata.get("attention.indexer.types") or [
        f"blk.{layer}.indexer.attn_k.weight" in metadata.index.tensors for layer in layers
    ]
    return {
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": metadata.must("attention.key_length_mla") - turned,
        "num_key_value_heads": metadata.must("attention.head_count"),
        "head_dim": turned,
        "layer_types": ["indexed_attention" for _ in layers],
        "indexer_types": [("shared", "full")[bool(full[layer])] for layer in layers],
    }


def _glm(metadata: GgufMetadata) -> Mapping[str, Any]:
    return {"use_qk_norm": metadata.has("attn_q_norm.weight"), "attention_bias": metadata.has("attn_q.bias")}


def _ernie(metadata: GgufMetadata) -> Mapping[str, Any]:
    moe = [int(name.split(".")[1]) for name in metadata.index.tensors if name.endswith("ffn_gate_inp.weight")]
    return {"moe_layer_end_index": max(moe, default=0), "use_bias": metadata.has("attn_q.bias")}


def _lfm2(metadata: GgufMetadata) -> Mapping[str, Any]:
    kv_heads = metadata.by_layer("attention.head_count_kv")
    return {
        "layer_types": ["full_attention" if heads else "conv" for heads in kv_heads],
        "conv_bias": metadata.has("shortconv.conv.bias"),
        "use_expert_bias": metadata.has("exp_probs_b.bias"),
    }


def _phimoe(metadata: GgufMetadata) -> Mapping[str, Any]:
    found: dict[str, Any] = {
        "attention_bias": metadata.has("attn_q.bias"),
        "lm_head_bias": "output.bias" in metadata.index.tensors,
    }
    if "rope_factors_long.weight" not in metadata.index.tensors:
        return found
    # Both the converter's, which works it out of the two contexts; the published short_mscale and long_mscale differ.
    scale = float(metadata.get("rope.scaling.attn_factor", 1.0))
    positions = {
        "rope_type": "longrope",
        "rope_theta": float(metadata.get("rope.freq_base", 10000.0)),
        "original_max_position_embeddings": metadata.must("rope.scaling.original_context_length"),
        "long_factor": metadata.floats("rope_factors_long.weight"),
        "short_factor": metadata.floats("rope_factors_short.weight"),
        "long_mscale": scale,
        "short_mscale": scale,
    }
    return {**found, "rope_parameters": positions}


def _linear_attention(metadata: GgufMetadata) -> Mapping[str, Any]:
    recurrent = metadata.get("attention.recurrent_layers")
    if recurrent is None:
        every = metadata.get("full_attention_interval", 4)
        recurrent = [bool((layer + 1) % every) for layer in range(metadata.num_layers)]
    kinds = ("full_attention", "linear_attention")
    value_heads = metadata.must("ssm.time_step_rank")
    return {
        "layer_types": [kinds[bool(is_recurrent)] for is_recurrent in recurrent[: metadata.num_layers]],
        "linear_conv_kernel_dim": metadata.must("ssm.conv_kernel"),
        "linear_key_head_dim": metadata.must("ssm.state_size"),
        "linear_num_key_heads": metadata.must("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": metadata.must("ssm.inner_size") // value_heads,
        "attention_bias": metadata.has("attn_k.bias"),
    }


_GRANITE_CHANGES = {**_PERMUTED, "shared_mlp.input_linear.weight": changes.SHARED_GATE_UP}
_GRANITE_NAMES = {"block_sparse_moe.router": "block_sparse_moe.router.layer"}
_DELTA_NORMS = {"linear_attn.norm.weight": None, "norm.weight": changes.NORM_PLUS_ONE}

FAMILIES: Mapping[str, GgufFamily] = {
    # conversion/llama.py: q and k are permuted. src/models/llama.cpp: weights of the chosen are normalised.
    "llama": GgufFamily("mixtral", changes=_PERMUTED, fixed=_NO_WINDOW),
    # src/models/qwen2moe.cpp: they are not.
    "qwen2moe": GgufFamily(
        "qwen2_moe",
        {**_QWEN, "norm_topk_prob": False},
        lambda metadata: {"qkv_bias": metadata.has("attn_q.bias")},
    ),
    "qwen3moe": GgufFamily("qwen3_moe", {**_QWEN, "norm_topk_prob": True, "attention_bias": False}),
    # Of text alone Qwen3-VL's positions are those of Qwen3.
    "qwen3vlmoe": GgufFamily("qwen3_moe", {**_QWEN, "norm_topk_prob": True, "attention_bias": False}),
    # src/models/openai-moe.cpp: every other layer has a window, first of all the first; src/llama-graph.cpp: the gate.
    "gpt-oss": GgufFamily(
        "gpt_oss",
        {"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        lambda metadata: _windows(metadata, 2),
        yarn={"truncate": False},
    ),
    "olmoe": GgufFamily("olmoe", {"norm_topk_prob": False, "attention_bias": False}),
    # conversion/deepseek.py: kv_b in two, keys' half transposed. src/models/deepseek2.cpp: which scores none means.
    "deepseek2": GgufFamily(
        "deepseek_v2",
        {"attention_bias": False, "rope_interleave": True, "mlp_bias": False},
        _deepseek,
        changes={"kv_b_proj.weight": changes.SPLIT_KV_B},
        scores=(SOFTMAX, SIGMOID),
        has_mscale=True,
    ),
    "glm-dsa": GgufFamily(
        "glm_moe_dsa",
        {"attention_bias": False, "mlp_bias": False},
        _glm_dsa,
        changes={"kv_b_proj.weight": changes.SPLIT_KV_B},
        scores=(SIGMOID,),
    ),
    "glm4moe": GgufFamily("glm4_moe", {}, _glm, scores=(SIGMOID,), turns_in_part=True),
    "granitemoe": GgufFamily(
        "granitemoe", {"attention_bias": False}, _granite, _GRANITE_NAMES, _GRANITE_CHANGES
    ),
    # conversion/mamba.py: A is stored in place of its logarithm.
    "granitehybrid": GgufFamily(
        "granitemoehybrid",
        {"attention_bias": False, "time_step_limit": [0.0, math.inf]},
        _granite_hybrid,
        _GRANITE_NAMES,
        {**_GRANITE_CHANGES, "A_log": changes.LOG_DECAY},
    ),
    # conversion/gemma.py: scales of the router and of experts are of no name in the map.
    "gemma4": GgufFamily(
        "gemma4_text",
        {"attention_bias": False, "enable_moe_block": True, "hidden_activation": "gelu_pytorch_tanh",
         "use_bidirectional_attention": None, "use_double_wide_mlp": False},
        _gemma4,
        changes={"router.scale": changes.ROUTER_SCALE, "router.per_expert_scale": changes.EXPERT_SCALES},
    ),
    # src/models/mimo2.cpp: weights of the chosen are normalised.
    "mimo2": GgufFamily("mimo_v2_flash", {"norm_topk_prob": True}, _mimo2, scores=(SIGMOID,)),
    # conversion/jamba.py: A is stored in place of its logarithm; attention's layers have heads of keys and values.
    "jamba": GgufFamily("jamba", {}, _jamba, changes={"A_log": changes.LOG_DECAY}),
    # src/models/nemotron-h.cpp: a layer without heads of keys and values, or width, is a state space. Transformers
    # has a least length of its steps, which llama.cpp has not and a file does not say: its default, 0.001.
    "nemotron_h_moe": GgufFamily(
        "nemotron_h",
        {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "time_step_min": 0.001, "sliding_window": None},
        _nemotron,
        {"model.": "backbone."},
        {"A_log": changes.LOG_DECAY},
        scores=(SIGMOID,),
    ),
    # The noise bounds which experts count as equals, also where none is made; 0.01 in all published models.
    "phimoe": GgufFamily("phimoe", {**_NO_WINDOW, "router_jitter_noise": 0.01}, _phimoe),
    "minimax-m2": GgufFamily(
        "minimax_m2",
        spellings={"mlp.e_score_correction": "block_sparse_moe.e_score_correction"},
        scores=(SIGMOID,),
        turns_in_part=True,
    ),
    "ernie4_5-moe": GgufFamily(
        "ernie4_5_moe", {"moe_norm_min": 1e-12}, _ernie, {"mlp.gate.moe_statics": "mlp.moe_statics"}
    ),
    "hunyuan-moe": GgufFamily("hunyuan_v1_moe", {"attention_bias": False}),
    "dots1": GgufFamily("dots1", {"attention_bias": False, **_NO_WINDOW}, scores=(SIGMOID,)),
    # src/models/lfm2.cpp: a layer without heads of keys and values is a convolution.
    "lfm2moe": GgufFamily("lfm2_moe", {"norm_topk_prob": True, "routed_scaling_factor": 1.0}, _lfm2, scores=(SIGMOID,)),
    # conversion/qwen.py: norms are stored plus one, A in place of its logarithm, queries, keys and values apart from
    # gates; and Qwen3.5's heads of values so that those of one key head lie apart.
    "qwen3next": GgufFamily(
        "qwen3_next",
        {**_QWEN, "norm_topk_prob": True},
        _linear_attention,
        changes={**_DELTA_NORMS, "in_proj_qkvz.weight": changes.QKVZ, "A_log": changes.LOG_DECAY},
        turns_in_part=True,
    ),
    "qwen35moe": GgufFamily(
        "qwen3_5_moe_text",
        {},
        _linear_attention,
        changes={
            **_DELTA_NORMS,
            "in_proj_qkv.weight": changes.VALUES_OF_QKV,
            "conv1d.weight": changes.VALUES_OF_QKV,
            "in_proj_z.weight": changes.VALUE_ROWS,
            "in_proj_a.weight": changes.VALUE_ROWS,
            "in_proj_b.weight": changes.VALUE_ROWS,
            "dt_bias": changes.VALUE_ROWS,
            "A_log": changes.VALUE_LOG_DECAY,
            "linear_attn.out_proj.weight": changes.VALUE_COLUMNS,
        },
        turns_in_part=True,
    ),
    "exaone-moe": GgufFamily("exaone_moe", {}, lambda metadata: _windows(metadata, 4), scores=(SIGMOID,)),
    "afmoe": GgufFamily(
        "afmoe", {"attention_bias": False, "mup_enabled": True}, lambda metadata: _windows(metadata, 4),
        always={"expert_weights_norm": True}, scores=(SIGMOID,),
    ),
}  # fmt: skip
