"""From what the user typed to a local path: a folder or a GGUF file as it is, or a hub id through the hub's cache."""

import re
from pathlib import Path

from foreroute.checkpoint.gguf_file import is_gguf, read_gguf
from foreroute.checkpoint.hub import HubAccess, fetch
from foreroute.checkpoint.index import CheckpointIndex, read_header, read_sharded
from foreroute.errors import CheckpointError, UnsupportedModelError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    quiet: bool = False,
    access: HubAccess | None = None,
) -> Path:
    """The local folder (or .gguf file) of a checkpoint; downloads it when it is a hub id (`org/name`) not cached.

    Args:
        revision: branch, tag or commit of a hub id. quiet: a download shows no bars. access: see HubAccess.
    Raises:
        CheckpointError: neither a folder, a GGUF file nor a hub id; a revision of a folder; or the download failed.
    """
    path = Path(path_or_hub_id).expanduser()
    text = str(path_or_hub_id)
    if not text:
        raise CheckpointError(
            "The model has no name. Give the folder of a checkpoint, or a hub id (organisation/name)."
        )
    if path.exists():
        if not _is_text(str(path)):
            raise CheckpointError(
                f"{text} has a name that is no text in this locale, so that its tokenizer cannot be opened. Rename it, "
                "or set LC_ALL=C.UTF-8."
            )
        if revision is not None:
            raise CheckpointError(f"{text} is here on this machine: a revision (--revision) is for hub ids.")
        if not path.is_dir() and not is_gguf(path):
            raise CheckpointError(
                f"{text} is a file, and no .gguf. Give the folder that holds config.json and *.safetensors."
            )
        return path
    if not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"{text} is not a folder here, and no hub id (organisation/name) either.")
    return fetch(text, revision, quiet=quiet, access=access or HubAccess())


def _is_text(path: str) -> bool:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_index(folder: str | Path) -> CheckpointIndex:
    """Read the headers of every safetensors file that the checkpoint in `folder` names.

    Args:
        folder: a local folder with `model.safetensors`, or `model.safetensors.index.json` and its shards;
            or a GGUF file.
    Raises:
        CheckpointError: not a folder, or a folder without weights.
        UnsupportedModelError: the weights are pickles.
        CorruptCheckpointError: a shard is absent, truncated, malformed, or does not hold what the index names.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" and folder.is_file():
        return read_gguf(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Give the folder that holds config.json and *.safetensors.")
    index_file = folder / "model.safetensors.index.json"
    single_file = folder / "model.safetensors"
    if index_file.is_file():
        return CheckpointIndex(folder, read_sharded(folder, index_file))
    if single_file.is_file():
        return CheckpointIndex(folder, {entry.name: entry for entry in read_header(single_file)})
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles:
        raise UnsupportedModelError(
            f"{folder} holds pickled weights ({pickles[0]}); foreroute reads safetensors only, as a pickle runs code. "
            "Convert it: load it once with transformers and save_pretrained() it."
        )
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f" It has {loose[0]}, but no model.safetensors.index.json that names it." if loose else ""
    raise CheckpointError(f"{folder} has no model.safetensors and no model.safetensors.index.json.{hint}")
