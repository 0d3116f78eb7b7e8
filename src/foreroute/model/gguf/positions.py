"""Which rotary positions the metadata of a GGUF file describe, as transformers' rope_parameters."""

from collections.abc import Mapping
from typing import Any

from foreroute.errors import UnsupportedModelError
from foreroute.model.gguf.metadata import GgufMetadata

# YaRN's settings in the metadata: transformers' name, or None and the only value with transformers' meaning.
_YARN: Mapping[str, tuple[str | None, float]] = {
    "yarn_beta_fast": ("beta_fast", 32.0),
    "yarn_beta_slow": ("beta_slow", 1.0),
    "yarn_ext_factor": (None, 1.0),
    "yarn_attn_factor": (None, 1.0),
    "attn_factor": (None, 1.0),
    "yarn_log_multiplier": (None, 0.0),
}
# Either read, or without effect on numbers.
_SCALING = frozenset({"type", "factor", "original_context_length", "finetuned", *_YARN})


def rope_parameters(metadata: GgufMetadata, yarn: Mapping[str, Any], *, has_mscale: bool) -> dict[str, Any]:
    """Describe the positions, but for the share of a head's dimensions that they turn.

    Args:
        yarn: what the family has with YaRN beside what is said. has_mscale: the family scales attention with YaRN
            (DeepSeek's mscale_all_dim); the metadata say a tenth of it.
    Raises:
        UnsupportedModelError: positions that transformers computes otherwise.
    """
    theta = float(metadata.get("rope.freq_base", 10000.0))
    said = {n.removeprefix("rope.scaling."): v for n, v in metadata.said.items() if n.startswith("rope.scaling.")}
    # In llama.cpp a factor without a type means linear scaling, as does the older scale_linear.
    factor = float(said.get("factor", metadata.get("rope.scale_linear", 1.0)))
    kind = said.get("type", "linear")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {"rope_type": "default", "rope_theta": theta}
    if kind != "yarn":
        raise UnsupportedModelError(
            f"{metadata.index.folder}: positions scaled as {kind} (rope.scaling.type) are not read."
        )
    if has_mscale and "yarn_log_multiplier" in said:
        scale = round(float(said.pop("yarn_log_multiplier")) / 0.1, 6)
        yarn = {**yarn, "mscale": scale, "mscale_all_dim": scale}
    unknown = sorted(said.keys() - _SCALING)
    others = [name for name, (ours, usual) in _YARN.items() if ours is None and said.get(name, usual) != usual]
    for name in unknown + others:
        raise UnsupportedModelError(
            f"{metadata.index.folder}: YaRN with {metadata.index.architecture}.rope.scaling.{name} {said[name]} is not "
            "read: transformers computes positions otherwise. Take the model's safetensors."
        )
    read = {ours: float(said.get(name, usual)) for name, (ours, usual) in _YARN.items() if ours is not None}
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": float(metadata.must("rope.scaling.factor")),
        "original_max_position_embeddings": int(metadata.must("rope.scaling.original_context_length")),
        **yarn,
        **read,
    }
