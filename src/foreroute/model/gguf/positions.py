"""Which rotary positions the metadata of a GGUF file describe, as transformers' rope_parameters."""

import math
from collections.abc import Mapping
from typing import Any

from foreroute.errors import CorruptCheckpointError, UnsupportedModelError
from foreroute.model.gguf.metadata import GgufMetadata

# Numbers that frequencies are divided by, a tensor that all layers share.
DIVISORS = "rope_freqs.weight"
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
    is_plain = kind == "none" or (kind == "linear" and factor in (0.0, 1.0))
    if DIVISORS in metadata.index.tensors:
        return _divided(metadata, theta, is_plain=is_plain)
    if is_plain:
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


def _divided(metadata: GgufMetadata, theta: float, *, is_plain: bool) -> dict[str, Any]:
    """Frequencies divided by stored numbers, as the converter writes Llama 3's scaling.

    transformers' LongRoPE divides by numbers too, and with the same ones at every length it is these. Its "llama3" has
    settings in their place, which the file does not hold.
    """
    divisors = metadata.floats(DIVISORS)
    heads = metadata.must("embedding_length") // metadata.must("attention.head_count")
    turned = metadata.get("rope.dimension_count", metadata.get("attention.key_length", heads))
    if not is_plain:
        raise UnsupportedModelError(
            f"{metadata.index.folder}: positions are scaled twice, by {DIVISORS} and by rope.scaling, which is not "
            "read. Take the model's safetensors."
        )
    if 2 * len(divisors) != turned or not all(0 < divisor < math.inf for divisor in divisors):
        raise CorruptCheckpointError(
            f"{metadata.index.folder}: {DIVISORS} has {len(divisors)} numbers, not all positive, or not one for two of "
            f"the {turned} dimensions that positions turn. Download it again."
        )
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": divisors,
        "long_factor": divisors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": int(metadata.must("context_length")),
    }
