"""Read config.json as transformers' config of the model, with errors that name the file and the key."""

from pathlib import Path
from typing import Any

from foreroute.checkpoint.gguf_file import is_gguf, read_gguf
from foreroute.errors import CheckpointError, UnsupportedModelError, named
from foreroute.model.build.config_sizes import check_sizes
from foreroute.model.build.generation_file import check_token_ids
from foreroute.model.build.gguf_model import gguf_config
from foreroute.whole_files import read_object


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
