"""From what the user typed to a local path: a folder or a GGUF file as it is, or a hub id through the hub's cache."""

import re
from pathlib import Path

from foreroute.checkpoint.gguf_file import is_gguf
from foreroute.checkpoint.hub import fetch
from foreroute.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(path_or_hub_id: str | Path, *, revision: str | None = None, quiet: bool = False) -> Path:
    """The local folder (or .gguf file) of a checkpoint; downloads it when it is a hub id (`org/name`) not cached.

    Args:
        revision: branch, tag or commit of a hub id. quiet: a download shows no bars.
    Raises:
        CheckpointError: neither a folder, a GGUF file nor a hub id; a revision of a folder; or the download failed.
    """
    path = Path(path_or_hub_id).expanduser()
    text = str(path_or_hub_id)
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"{text} is here on this machine: a revision (--revision) is for hub ids.")
        if not path.is_dir() and not is_gguf(path):
            raise CheckpointError(
                f"{text} is a file, and no .gguf. Give the folder that holds config.json and *.safetensors."
            )
        return path
    if not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"{text} is not a folder here, and no hub id (organisation/name) either.")
    return fetch(text, revision, quiet=quiet)
