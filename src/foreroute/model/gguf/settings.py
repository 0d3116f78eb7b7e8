"""Make transformers' settings of a model from a GGUF file's metadata."""

import inspect
import math
from collections.abc import Collection
from typing import Any

from foreroute.checkpoint.gguf_file import GgufIndex
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError
from foreroute.model.gguf.families import FAMILIES, GgufFamily
from foreroute.model.gguf.metadata import SCALES, SETTINGS, GgufMetadata
from foreroute.model.gguf.positions import rope_parameters

# What some configs take, and do not name.
_UNNAMED = frozenset({"head_dim", "global_head_dim", "num_global_key_value_heads"})


def family_of(index: GgufIndex) -> GgufFamily:
    """The declaration of the file's architecture.

    Raises:
        UnsupportedModelError: there is none. CorruptCheckpointError: the file does not say which.
    """
    said = index.settings.get("general.architecture")
    if not isinstance(said, str):
        raise CorruptCheckpointError(
            f"{index.folder}: general.architecture is {'not said' if said is None else f'{said!r:.60}, no name'}. "
            "Download it again; if that does not help, its converter is not llama.cpp's."
        )
    if index.architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"{index.folder}: GGUF files of architecture {index.architecture} are not read; those of "
            f"{', '.join(FAMILIES)} are. Take the model's safetensors."
        )
    return FAMILIES[index.architecture]


def settings_of(index: GgufIndex) -> tuple[str, dict[str, Any]]:
    """Convert the metadata to the model type and arguments of transformers' config.

    Raises:
        CorruptCheckpointError: a setting is absent, or NaN. UnsupportedModelError: another architecture, a setting that
            is not known, or one that transformers has no place for.
    """
    family, metadata = family_of(index), GgufMetadata(index)
    for name in ("context_length", "block_count", "embedding_length", "attention.head_count"):
        metadata.must(name)
    if not metadata.get("expert_count", 0):
        raise UnsupportedModelError(
            f"{index.folder} is a dense model ({index.architecture}): it has no experts to offload. Run it with "
            "llama.cpp."
        )
    metadata.check_known()
    _check_numbers(metadata)
    more = dict(family.more(metadata))
    model_type = str(more.pop("model_type", family.model_type))
    names = _names(model_type)
    found = {"num_hidden_layers": metadata.num_layers, **_common(metadata, names, family), **family.fixed}
    scores = metadata.get("expert_gating_func", family.scores[0])
    if scores not in family.scores:
        raise metadata.refused("expert_gating_func", f"which transformers' {model_type} does not compute")
    if "token_embd.weight" not in index.shapes:
        raise CorruptCheckpointError(f"{index.folder} lacks token_embd.weight. Download it again.")
    found["vocab_size"] = index.shapes["token_embd.weight"][0]
    found["tie_word_embeddings"] = "output.weight" not in index.tensors
    found["rope_parameters"] = rope_parameters(metadata, family.yarn, has_mscale=family.has_mscale)
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = index.settings.get(f"tokenizer.ggml.{theirs}_token_id")
        # An id out of range is an old converter's way to say that there is none.
        is_out = type(number) is int and not 0 <= number < found["vocab_size"]
        found[f"{ours}_token_id"] = None if is_out else number
    if "head_dim" not in more:
        _add_heads(metadata, family, found, names)
    return model_type, {name: value for name, value in {**found, **more}.items() if name in names or name in _UNNAMED}


def _check_numbers(metadata: GgufMetadata) -> None:
    """Check that no setting is NaN or infinite. Raises CorruptCheckpointError: one is."""
    for name, value in metadata.said.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(one, float) and not math.isfinite(one) for one in numbers):
            raise CorruptCheckpointError(
                f"{metadata.index.folder}: {metadata.index.architecture}.{name} is {value!r:.60}. Download it again."
            )


def _names(model_type: str) -> Collection[str]:
    """The settings that transformers' config of the type has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    return {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map} - {"kwargs"}


def _common(metadata: GgufMetadata, names: Collection[str], family: GgufFamily) -> dict[str, Any]:
    """What all architectures say alike."""
    metadata.must("expert_used_count")
    found: dict[str, Any] = {}
    for name, ours in SETTINGS.items():
        place = next((one for one in ours if one in names), None)
        if place is not None and metadata.get(name) is not None:
            found[place] = metadata.get(name)
    for name, (ours, usual) in SCALES.items():
        place = next((one for one in ours if one in names), None)
        value = metadata.get(name, usual)
        if place is not None and value is not None:
            found[place] = value
        elif value not in (None, family.always.get(name, usual), 0):
            raise metadata.refused(name, "which transformers' family does not do")
    return found


def _add_heads(metadata: GgufMetadata, family: GgufFamily, found: dict[str, Any], names: Collection[str]) -> None:
    """Add the widths of attention's heads, their number, and the part of them that positions turn."""
    counts = {count for count in metadata.by_layer("attention.head_count_kv", found["num_attention_heads"]) if count}
    if len(counts) != 1:
        raise metadata.refused("attention.head_count_kv", "another number of heads in some layers")
    found["num_key_value_heads"] = counts.pop()
    usual = found["hidden_size"] // found["num_attention_heads"]
    width = metadata.get("attention.key_length", usual)
    if metadata.get("attention.value_length", width) != width:
        raise metadata.refused("attention.value_length", f"where keys have {width}")
    if width != usual or "head_dim" in names:
        found["head_dim"] = width
    turned = metadata.get("rope.dimension_count", width)
    if family.turns_in_part:
        found["rope_parameters"] = {**found["rope_parameters"], "partial_rotary_factor": turned / width}
    elif turned != width and "rope_parameters" in names:
        raise UnsupportedModelError(
            f"{metadata.index.folder}: positions turn {turned} of a head's {width} dimensions "
            f"({metadata.index.architecture}.rope.dimension_count), which is not read."
        )
