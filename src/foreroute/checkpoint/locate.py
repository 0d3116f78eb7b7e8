"""From what the user typed to a local folder: a path as it is, or a hub id through huggingface_hub's cache."""

import re
from pathlib import Path

from foreroute.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NEEDED_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


def locate(path_or_hub_id: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a checkpoint; downloads it when it is a hub id (`org/name`) that is not cached.

    Raises:
        CheckpointError: neither a folder nor a hub id, or the download failed.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    text = str(path_or_hub_id)
    if path.exists():
        raise CheckpointError(f"{text} is a file. Give the folder that holds config.json and *.safetensors.")
    if not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"{text} is not a folder here, and no hub id (organisation/name) either.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=list(_NEEDED_FILES)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{text} is not a folder here, and could not be fetched from the hub: {error}") from error
