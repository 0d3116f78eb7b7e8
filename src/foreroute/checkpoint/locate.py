"""Find a checkpoint's local path: a folder or GGUF file as given, or a hub id through the hub's cache."""

import difflib
import logging
import re
from functools import cache
from pathlib import Path

from foreroute.checkpoint.gguf_file import is_gguf, read_gguf
from foreroute.checkpoint.gguf_names import first_part, only_gguf, passed_over
from foreroute.checkpoint.hub.fetch import HubAccess, fetch
from foreroute.checkpoint.index import INDEX, SINGLE, CheckpointIndex, named_weights, read_sharded, read_single
from foreroute.errors import CheckpointError, UnsupportedModelError
from foreroute.shipped import shipped_models

_LOG = logging.getLogger(__name__)
# With the name of a quantisation, or of a file, behind a colon.
_HUB_ID = re.compile(
    r"(?:(?:https://)?(?:hf\.co|huggingface\.co)/)?([\w.-]+/[\w.-]+)(?::([\w.-]+|[\w./-]+\.(?i:gguf)))?"
)
# Written by transformers' distributed training, and preferred by transformers over every other file.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def locate(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    quiet: bool = False,
    access: HubAccess | None = None,
) -> Path:
    """Find the local folder (or GGUF file) of `path_or_hub_id`; download a hub id (`org/name`) that is not cached.

    Of a folder that holds one GGUF file and no other checkpoint it is that file. `org/name:Q4_K_M` is the GGUF model of
    that name in a repository of the hub, unless it is a path here. The hub's address may stand before a hub id
    (hf.co/org/name), as for other programs. A model that ships is found by its name alone.

    Args:
        revision: branch, tag or commit of a hub id. quiet: no progress bars. access: see HubAccess.
    Raises:
        CheckpointError: not a folder, GGUF file or hub id; a revision of a folder; or the download failed.
    """
    text = str(path_or_hub_id)
    try:
        path = Path(path_or_hub_id).expanduser()
        is_here = path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a user or a folder that cannot be looked into
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{text[:200]} cannot be opened: {reason}.") from error
    if not text:
        raise CheckpointError(
            "The model has no name. Give the folder of a checkpoint, or a hub id (organisation/name)."
        )
    if is_here:
        if not _is_text(str(path)):
            raise CheckpointError(
                f"{text} has a name that is not text in this locale, so that its tokenizer cannot be opened. Rename "
                "it, or set LC_ALL=C.UTF-8."
            )
        if revision is not None:
            raise CheckpointError(f"{text} is here on this machine: a revision (--revision) is for hub ids.")
        if not path.is_dir() and not is_gguf(path):
            raise CheckpointError(
                f"{text} is a file, and no .gguf. Give the folder that holds config.json and *.safetensors."
            )
        return (only_gguf(path) or path) if path.is_dir() else first_part(path)
    ships = shipped_models()
    if text in ships:
        if revision is not None:
            raise CheckpointError(f"{text} ships with foreroute: a revision (--revision) is for hub ids.")
        return ships[text]
    hub_id = split_hub_id(text)
    if hub_id is None:
        near = difflib.get_close_matches(text, ships, 1)
        raise CheckpointError(
            f"{text} is not a folder here, and no hub id (organisation/name, or organisation/name:Q4_K_M) either."
            + (f" Did you mean {near[0]}, which ships?" if near else "")
        )
    return fetch(hub_id[0], revision, tag=hub_id[1], quiet=quiet, access=access or HubAccess())


def split_hub_id(text: str) -> tuple[str, str | None] | None:
    """The hub id in `text` (organisation/name), and the name behind its colon; None where it is no hub id."""
    found = _HUB_ID.fullmatch(text)
    return None if found is None else (found[1], found[2])


def _is_text(path: str) -> bool:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_index(folder: str | Path) -> CheckpointIndex:
    """Read the headers of every safetensors file of the checkpoint in `folder`, chosen as transformers chooses them.

    In order: the file that config.json names as `transformers_weights`; `model.safetensors`; the shards that
    `model.safetensors.index.json` names. Dense weights and experts are read from these files only.

    Args:
        folder: a local folder, or a GGUF file.
    Raises:
        CheckpointError: not a folder, or a folder without weights.
        UnsupportedModelError: the weights are pickles, or transformers would load others: an adapter, or the shards of
            a distributed checkpoint.
        CorruptCheckpointError: a shard is absent, truncated, malformed, or lacks tensors of the index.
        ReadError: a file cannot be read.
    """
    folder = Path(folder)
    if is_gguf(folder):
        return read_gguf(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Give the folder that holds config.json and *.safetensors.")
    _refuse_others(folder)
    index_file, single_file = folder / INDEX, folder / SINGLE
    named = named_weights(folder)
    if named is not None and not (folder / named).is_file():
        raise CheckpointError(f"{folder} has no {named}, which its config.json names as transformers_weights.")
    if named is not None:
        read = read_sharded if named.endswith(".index.json") else read_single
        return read(folder / named)
    if single_file.is_file():
        if index_file.is_file() and any(folder.glob("model-*.safetensors")):
            _say_which(single_file, index_file)
        return read_single(single_file)
    if index_file.is_file():
        return read_sharded(index_file)
    raise _no_weights(folder)


def _no_weights(folder: Path) -> CheckpointError:
    """The reason why `folder` has no weights that are read here."""
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles:
        return UnsupportedModelError(
            f"{folder} holds pickled weights ({pickles[0]}); foreroute reads safetensors only, as a pickle runs code. "
            "Convert it: load it once with transformers and save_pretrained() it."
        )
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f" It has {loose[0]}, but no model.safetensors.index.json that names it." if loose else ""
    hint += passed_over((path.name for path in folder.glob("*")), f"{folder}/")
    return CheckpointError(f"{folder} has no model.safetensors and no model.safetensors.index.json.{hint}")


def _refuse_others(folder: Path) -> None:
    """Refuse files that transformers would load beside or in place of those read here."""
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            f"{folder} holds an adapter (adapter_config.json), which transformers would put on the model and foreroute "
            "does not. Merge it into the weights (peft's merge_and_unload), or take it out of the folder."
        )
    distributed = next((path.name for path in sorted(folder.iterdir()) if _DISTRIBUTED.fullmatch(path.name)), None)
    if distributed is not None:
        raise UnsupportedModelError(
            f"{folder} holds a distributed checkpoint ({distributed}), which transformers takes before "
            f"{SINGLE} and foreroute does not read. Load it with transformers and save_pretrained() it elsewhere, or "
            "take those files out of the folder."
        )


@cache
def _say_which(single_file: Path, index_file: Path) -> None:
    _LOG.warning("%s is read, as transformers does; the shards that %s names are not.", single_file, index_file.name)
