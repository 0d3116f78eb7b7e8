"""Map GGUF names to transformers' names: settings, dense tensors, experts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreroute.checkpoint.assembly import GGUF_PREFIX, Coding, StoredMatrix, StoredPart
from foreroute.checkpoint.gguf_file import EXPERT_BLOCKS, GgufIndex
from foreroute.checkpoint.layouts import LayerExperts, PartSource, layer_experts
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError

_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAME = re.compile(r"\.layers\.(\d+)\.")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}


@dataclass(frozen=True)
class _Family:
    """model_type: transformers'. dense: names of a block's tensors. settings: transformers' names of metadata.

    fixed: settings implied by the architecture and absent from the metadata.
    is_interleaved: gate and up rows alternate. is_transposed: matrices are [in, out] in the model.
    """

    model_type: str
    dense: Mapping[str, str]
    settings: Mapping[str, str]
    fixed: Mapping[str, Any]
    yarn: Mapping[str, Any]
    is_interleaved: bool = False
    is_transposed: bool = False


_COMMON_SETTINGS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_used_count": "num_experts_per_tok",
}
# YaRN's settings in the metadata: transformers' name, or None and the only value with transformers' meaning.
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
_YARN_SETTINGS: Mapping[str, tuple[str | None, float]] = {
    "yarn_beta_fast": ("beta_fast", 32.0),
    "yarn_beta_slow": ("beta_slow", 1.0),
    "yarn_ext_factor": (None, 1.0),
    "yarn_attn_factor": (None, 1.0),
    "attn_factor": (None, 1.0),
    "yarn_log_multiplier": (None, 0.0),
}
# Either read, or without effect on numbers.
_SCALING_SETTINGS = frozenset({"type", "factor", "original_context_length", "finetuned", *_YARN_SETTINGS})
_FAMILIES = {
    "qwen3moe": _Family(
        "qwen3_moe",
        {
            **_ATTENTION,
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.gate",
        },
        {"expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"},
        {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        _YARN,
    ),
    "gpt-oss": _Family(
        "gpt_oss",
        {
            **_ATTENTION,
            "attn_sinks": "self_attn.sinks",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
        {
            "expert_count": "num_local_experts",
            "expert_feed_forward_length": "intermediate_size",
            "attention.sliding_window": "sliding_window",
        },
        {},
        {**_YARN, "truncate": False},
        is_interleaved=True,
        is_transposed=True,
    ),
}


def settings_of(index: GgufIndex) -> tuple[str, dict[str, Any]]:
    """Convert the metadata to the model type and arguments of transformers' config.

    Raises:
        CorruptCheckpointError: a setting is absent. UnsupportedModelError: unknown scaling of positions.
    """
    family = _FAMILIES[index.architecture]
    found: dict[str, Any] = dict(family.fixed)
    for theirs, ours in {**_COMMON_SETTINGS, **family.settings}.items():
        found[ours] = _setting(index, theirs)
    width = found["hidden_size"] // found["num_attention_heads"]
    found["head_dim"] = index.settings.get(f"{index.architecture}.attention.key_length", width)
    rotated = index.settings.get(f"{index.architecture}.rope.dimension_count", found["head_dim"])
    if rotated != found["head_dim"]:
        raise UnsupportedModelError(
            f"{index.folder}: positions turn {rotated} of a head's {found['head_dim']} dimensions "
            f"({index.architecture}.rope.dimension_count), which is not read."
        )
    if "token_embd.weight" not in index.shapes:
        raise CorruptCheckpointError(f"{index.folder} lacks token_embd.weight. Download it again.")
    found["vocab_size"] = index.shapes["token_embd.weight"][0]
    found["tie_word_embeddings"] = "output.weight" not in index.tensors
    found["rope_parameters"] = _positions(index, family)
    for name in ("bos", "eos"):
        found[f"{name}_token_id"] = index.settings.get(f"tokenizer.ggml.{name}_token_id")
    found["pad_token_id"] = index.settings.get("tokenizer.ggml.padding_token_id")
    return family.model_type, found


def _positions(index: GgufIndex, family: _Family) -> dict[str, Any]:
    said = {
        name.removeprefix(f"{index.architecture}.rope.scaling."): value
        for name, value in index.settings.items()
        if name.startswith(f"{index.architecture}.rope.scaling.")
    }
    theta = float(index.settings.get(f"{index.architecture}.rope.freq_base", 10000.0))
    # In llama.cpp a factor without a type means linear scaling, as does the older scale_linear.
    factor = float(said.get("factor", index.settings.get(f"{index.architecture}.rope.scale_linear", 1.0)))
    kind = said.get("type", "linear")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {"rope_type": "default", "rope_theta": theta}
    if kind != "yarn":
        raise UnsupportedModelError(f"{index.folder}: positions scaled as {kind} (rope.scaling.type) are not read.")
    unknown = sorted(said.keys() - _SCALING_SETTINGS)
    others = [name for name, (ours, usual) in _YARN_SETTINGS.items() if ours is None and said.get(name, usual) != usual]
    for name in unknown + others:
        raise UnsupportedModelError(
            f"{index.folder}: YaRN with {index.architecture}.rope.scaling.{name} {said[name]} is not read: "
            "transformers computes positions otherwise. Take the model's safetensors."
        )
    read = {ours: float(said[name]) for name, (ours, _) in _YARN_SETTINGS.items() if ours is not None and name in said}
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": float(_setting(index, "rope.scaling.factor")),
        "original_max_position_embeddings": int(_setting(index, "rope.scaling.original_context_length")),
        **family.yarn,
        **read,
    }


def _setting(index: GgufIndex, name: str) -> Any:
    full = f"{index.architecture}.{name}"
    if full not in index.settings:
        raise CorruptCheckpointError(
            f"{index.folder} does not say {full}. Its converter is too old, or not llama.cpp's."
        )
    return index.settings[full]


def dense_names(index: GgufIndex) -> dict[str, str]:
    """transformers' name for every tensor that is not an expert's.

    Raises:
        UnsupportedModelError: a tensor without one.
    """
    family = _FAMILIES[index.architecture]
    named: dict[str, str] = {}
    for name in index.tensors:
        stem, _, ending = name.rpartition(".")
        block = _BLOCK_NAME.fullmatch(name)
        if block is None and stem in _TOP and ending == "weight":
            named[name] = f"{_TOP[stem]}.weight"
        elif block is not None and block[2] in family.dense:
            ours = f"model.layers.{block[1]}.{family.dense[block[2]]}"
            named[name] = ours if block[2] == "attn_sinks" else f"{ours}.{block[3]}"
        elif "_exps." not in name:
            raise UnsupportedModelError(
                f"{index.folder}: {name} is not known in a model of architecture {index.architecture}."
            )
    return named


def gguf_layer(
    name: str, num_experts: int, parameters: Sequence[tuple[str, tuple[int, ...]]], index: GgufIndex
) -> LayerExperts:
    """Lay out one layer's experts as the file `index` has them: gate, up and down in blocks, each of them one range.

    Args:
        name: of the module with `num_experts` experts. parameters: name and one expert's shape, in the module's order.
    Raises:
        CorruptCheckpointError: a tensor is absent, or its shape differs from the metadata.
    """
    family, found = _FAMILIES[index.architecture], _LAYER_NAME.search(name)
    assert found is not None, f"{name} is in no layer"
    sources: list[PartSource] = []
    parts: list[StoredPart] = []
    for part, shape in parameters:
        is_up = part.startswith("gate_up_proj")
        ending = "bias" if part.endswith("_bias") else "weight"
        stored = [f"blk.{found[1]}.ffn_{which}_exps.{ending}" for which in (("gate", "up") if is_up else ("down",))]
        matrices = []
        for tensor in stored:
            source, matrix = _matrix(part, tensor, len(sources), index)
            sources.append(source)
            matrices.append(matrix)
        transposed = family.is_transposed and ending == "weight"
        made = (sum(matrix.rows for matrix in matrices), matrices[0].cols)
        if (made[::-1] if transposed else made) != (shape if len(shape) > 1 else (*shape, 1)):
            raise CorruptCheckpointError(
                f"{index.folder}: {stored[0]} gives an expert {list(made)}, the metadata {list(shape)}."
            )
        parts.append(
            StoredPart(
                part, shape, tuple(matrices), is_transposed=transposed, is_interleaved=is_up and family.is_interleaved
            )
        )
    laid = layer_experts(name, num_experts, sources, index)
    kinds = sorted({index.kinds[source.groups[0][0]] for source in sources if source.groups[0][0].endswith("weight")})
    stored_as = "gguf " + "+".join(kinds)
    return LayerExperts(name, num_experts, laid.layout, laid.sources, parts=tuple(parts), stored_as=stored_as)


def _matrix(part: str, tensor: str, at: int, index: GgufIndex) -> tuple[PartSource, StoredMatrix]:
    if tensor not in index.tensors:
        raise CorruptCheckpointError(f"{index.folder} lacks {tensor}. Its converter is too old, or not llama.cpp's.")
    kind = index.kinds[tensor]
    rows, row_bytes = index.tensors[tensor].shape[1:]
    weights, nbytes = EXPERT_BLOCKS[kind]
    source = PartSource(f"{part}.{at}", (rows, row_bytes), ((tensor,),), dtypes=("U8",))
    return source, StoredMatrix(Coding(GGUF_PREFIX + kind), (at,), rows, row_bytes // nbytes * weights)
