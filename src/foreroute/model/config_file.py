"""Read transformers' config of a model, from config.json or a GGUF file's metadata, and check that it can be right.

Errors name the file and the key. Sizes are held against the weights before a model is built from them: a config of
2**62 layers would create lists of that length before its weights are looked for. Of a GGUF file, transformers' own
table of settings lacks the head width and the expert width (5.23), and so gives models of other shapes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foreroute.checkpoint.gguf_file import GgufIndex, is_gguf, read_gguf
from foreroute.checkpoint.index import CheckpointIndex
from foreroute.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError, named
from foreroute.model.generation_settings import check_token_ids
from foreroute.model.gguf.metadata import GgufMetadata
from foreroute.model.gguf.settings import settings_of
from foreroute.whole_files import read_object

# Ten times the largest known models; the exact check against the weights follows once their names are known.
_MOST_LAYERS, _MOST_EXPERTS = 10_000, 100_000
_LAYERS = re.compile(r"(num_|n_)?((hidden|decoder|encoder|nextn_predict|hash|mtp)_)?layers?|block_count|depth")
_EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_|shared_)?experts|expert_count")
_CHOSEN = re.compile(
    r"num_experts_per_tok(en)?|num_selected_experts|experts_per_tok(en)?|expert_used_count|moe_top_?k|top_k_experts|"
    r"router_topk|moe_k"
)
# A fused parameter may be stored as two or three matrices, each in up to four tensors where it is quantised.
_TENSORS_PER_PARAMETER, _MORE_TENSORS = 12, 1000
# This many layers more than the weights' names suggest are left to the exact check: some models number other parts.
_SLACK_LAYERS = 64
_NUMBER = re.compile(r"(?<![^.])\d{1,9}(?![^.])")


def read_config(folder: Path) -> Any:
    """Read transformers' config of the checkpoint in `folder`; no remote code is run.

    Raises:
        CheckpointError: no config.json, one that is not JSON, or one with impossible values; named.
        UnsupportedModelError: a model type that the installed transformers does not have.
    """
    import transformers
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if is_gguf(folder):
        return gguf_config(read_gguf(folder))
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{folder} has no config.json. Give the folder of a Hugging Face checkpoint.")
    stored = read_object(config_file, CheckpointError)
    model_type = stored.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        own_code = " It comes with its own code, which foreroute does not run." if "auto_map" in stored else ""
        raise UnsupportedModelError(
            f"{config_file}: transformers {transformers.__version__} does not know model type "
            f"{model_type!r:.60}.{own_code}"
        )
    check_sizes(stored, config_file)
    text = stored.get("text_config")
    for settings in (stored, text if isinstance(text, dict) else {}):
        check_token_ids(settings, config_file)
    with named(f"{config_file} is not a config of {model_type}", CheckpointError):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        is_whole = isinstance(config.get_text_config(), PreTrainedConfig)
    if not is_whole:
        raise CheckpointError(f"{config_file}: text_config is {stored.get('text_config')!r:.60}, not an object.")
    return config


def refuse_encoder_decoder(config: Any, folder: Path, what: str) -> None:
    """Refuse a model whose encoder reads the prompt and whose decoder writes the answer.

    Args:
        config: of the model in `folder`. what: which is not possible, and what is instead.
    Raises:
        UnsupportedModelError: it is such a model.
    """
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{folder}: {config.model_type} is an encoder-decoder. {what}")


def gguf_config(index: GgufIndex) -> Any:
    """Make transformers' config of the model in the file.

    Raises:
        CheckpointError: the metadata do not describe a model.
    """
    from transformers import AutoConfig

    with named(f"{index.folder}: its metadata describe no {index.architecture}", CheckpointError):
        # First, as some settings become a list with an item for each layer.
        check_sizes(GgufMetadata(index).said, index.folder)
        model_type, settings = settings_of(index)
        check_sizes(settings, index.folder)
        return AutoConfig.for_model(model_type, **settings)


def check_sizes(settings: Mapping[str, Any], source: Path) -> None:
    """Check that the counts of layers and experts in `settings` are plausible, before anything is built from them.

    Raises:
        CheckpointError: one is not; named, with the file `source`.
    """
    waiting = [settings]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, Mapping):
                waiting.append(value)
            # Other types of values are left to the config's own class.
            elif type(value) is int and _LAYERS.fullmatch(name) and not -1 <= value <= _MOST_LAYERS:
                raise CheckpointError(f"{source}: {name} is {value}; no model has that many layers.")
            elif type(value) is int and _is_of_experts(name) and not -1 <= value <= _MOST_EXPERTS:
                raise CheckpointError(f"{source}: {name} is {value}; no model has that many experts.")


def _is_of_experts(name: str) -> bool:
    return bool(_EXPERTS.fullmatch(name) or _CHOSEN.fullmatch(name))


def check_against(config: Any, index: CheckpointIndex) -> None:
    """Check that `config` has about as many layers and experts as the files of `index`, before the model is built.

    The files thus bound the cost of building. Presence and shape of every tensor are checked with the model.

    Raises:
        CorruptCheckpointError: it has far more layers or experts.
        CheckpointError: a window, or the context, holds no token.
    """
    text = config.get_text_config()
    numbers = [_NUMBER.findall(name) for name in index.tensors]
    layers = 1 + max((int(found[0]) for found in numbers if found), default=0)
    asked = getattr(text, "num_hidden_layers", None)
    if type(asked) is int and asked > 2 * min(layers, len(index.tensors)) + _SLACK_LAYERS:
        raise CorruptCheckpointError(_of_different_models(index, f"num_hidden_layers is {asked}", f"{layers} layers"))
    _check_least(text, index)
    experts = max((1 + int(one) for found in numbers for one in found[1:]), default=0)
    experts = max([experts, *(entry.shape[0] for entry in index.tensors.values() if len(entry.shape) > 1)])
    for name, value in vars(text).items():
        if _EXPERTS.fullmatch(name) and type(value) is int and value > experts:
            raise CorruptCheckpointError(_of_different_models(index, f"{name} is {value}", f"at most {experts}"))


def _check_least(text: Any, index: CheckpointIndex) -> None:
    """Check settings that any model is built with, but that leave it computing nothing, or nothing useful."""
    has_windows = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    for name in ("max_position_embeddings", "topk_group", *(("sliding_window",) if has_windows else ())):
        value = getattr(text, name, None)
        if type(value) is int and value < 1:
            raise CheckpointError(f"{_source(index)}: {name} is {value}; it must be at least 1.")


def check_number(index: CheckpointIndex, num_parameters: int) -> None:
    """Check that the files hold about as many tensors as the model, before each name is looked up in it.

    Args:
        index: of the files. num_parameters: of the model, each expert's counted.
    Raises:
        CorruptCheckpointError: the files hold far more.
    """
    if len(index.tensors) > _TENSORS_PER_PARAMETER * num_parameters + _MORE_TENSORS:
        raise CorruptCheckpointError(
            f"{index.folder} holds {len(index.tensors):,} tensors; a model as its config.json has it, about "
            f"{num_parameters:,}. config.json and the weights are of different models."
        )


def check_choice(config: Any, num_experts: int, source: Path) -> None:
    """Check that each token uses at least one expert, and no more than exist.

    Args:
        num_experts: of the layer with the most. source: of `config`, for the message.
    Raises:
        CheckpointError: the config says otherwise; its key is named.
    """
    for name, value in vars(config.get_text_config()).items():
        if _CHOSEN.fullmatch(name) and type(value) is int and not 0 < value <= num_experts:
            raise CheckpointError(
                f"{source}: {name} is {value}; of {num_experts} experts a token is computed by 1 to {num_experts}."
            )


def _of_different_models(index: CheckpointIndex, said: str, held: str) -> str:
    which = "Metadata" if index.kind == "gguf" else "config.json"
    return f"{_source(index)}: {said}, and the files hold {held}. {which} and weights are of different models."


def _source(index: CheckpointIndex) -> Path:
    return index.folder if index.kind == "gguf" else index.folder / "config.json"
