"""A checkpoint from the hub: the files that are read here and no others, into huggingface_hub's own cache.

Its cache, its resumption of downloads, its bars, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE hold as they do everywhere.
What is added is which files: those that the index names (or the one file), the config, the tokenizer and the chat
template, from the top folder alone. Pickles, other formats and second copies ("original/", "consolidated") stay there.
"""

import contextlib
import json
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import cast

from foreroute.errors import CheckpointError, UnsupportedModelError

_LOG = logging.getLogger(__name__)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Beside the weights. Names ending so that are no settings of a model (an index of pickles) are left out.
_SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt")
_NOT_SETTINGS = ("*/*", "*.bin.index.json", "*.msgpack.index.json", "*.h5.index.json", "consolidated*")
_FREE_BESIDE_BYTES = 64 * 2**20


def fetch(hub_id: str, revision: str | None = None, *, quiet: bool = False) -> Path:
    """The local folder of `hub_id` at `revision` (a branch, tag or commit; the hub's main branch when None).

    Files that are in the cache are not fetched again; half of one is gone on with. Without a network, or with
    HF_HUB_OFFLINE, what the cache has is taken.

    Args:
        quiet: without progress bars.
    Raises:
        UnsupportedModelError: there are no safetensors in it.
        CheckpointError: no such repository or revision, no access, no network, or too little disk; which, is said.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # The base of every error of the HTTP library, which is another one with each major version of huggingface_hub.
    http_error = cast(type[Exception], HfHubHTTPError.__mro__[1])
    label = hub_id if revision is None else f"{hub_id} at revision {revision}"
    with _bars(quiet):
        try:
            found = None if constants.HF_HUB_OFFLINE else _online_files(hub_id, revision, label)
        except (http_error, OSError, ValueError) as error:
            found = None
            if not _is_away(error, http_error):
                raise CheckpointError(_explain(error, label)) from error
            reason: str | None = _first_line(error)
        else:
            reason = None
        if found is None:
            return _cached(hub_id, revision, label, reason)
        try:
            commit, files = found
            _check_room(hub_id, commit, label, files)
            # The commit, not the branch: which may move on after its files were listed.
            folder = snapshot_download(hub_id, revision=commit, allow_patterns=[_escaped(name) for name in files])
            _note_commit(hub_id, revision or constants.DEFAULT_REVISION, commit)
            return Path(folder)
        except (http_error, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(_explain(error, label)) from error


def _online_files(hub_id: str, revision: str | None, label: str) -> tuple[str, dict[str, int]]:
    """The commit, and the files to fetch with their bytes."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(hub_id, revision=revision, files_metadata=True)
    there = {entry.rfilename: int(entry.size or 0) for entry in info.siblings or ()}
    wanted = [name for name in there if _is_like(name, _SETTINGS) and not _is_like(name, _NOT_SETTINGS)]
    if _INDEX in there:
        index_file = hf_hub_download(hub_id, _INDEX, revision=info.sha)
        try:
            wanted += sorted(set(json.loads(Path(index_file).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{label}: its {_INDEX} is not a safetensors index ({error!r}).") from None
        absent = [name for name in wanted if name not in there]
        if absent:
            raise CheckpointError(f"{label}: {_INDEX} names {absent[0]}, which is not in the repository.")
    elif _SINGLE in there:
        wanted.append(_SINGLE)
    else:
        raise UnsupportedModelError(_no_weights(label, sorted(there)))
    return str(info.sha), {name: there[name] for name in wanted}


def _no_weights(label: str, names: list[str]) -> str:
    of_kind = {
        end: [name for name in names if name.endswith(end)] for end in (".gguf", ".safetensors", ".bin", ".pt", ".pth")
    }
    said = f"{label} has no {_SINGLE} and no {_INDEX}."
    if of_kind[".gguf"]:
        return f"{said} It has GGUF files: download one ({of_kind['.gguf'][0]}) and give its path."
    if of_kind[".safetensors"]:
        return f"{said} It has {of_kind['.safetensors'][0]}, which no index names: not a checkpoint of transformers."
    pickles = of_kind[".bin"] + of_kind[".pt"] + of_kind[".pth"]
    if pickles:
        return f"{said} It has pickled weights ({pickles[0]}), which are not read, as a pickle runs code."
    return f"{said} It holds no weights at all."


def _cached(hub_id: str, revision: str | None, label: str, reason: str | None) -> Path:
    """What the cache has; whether all shards are there, read_index finds out."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=["config.json", _INDEX])
        )
    except (OSError, ValueError) as error:
        if reason is None:
            why = "HF_HUB_OFFLINE is set. Unset it to download the model"
        else:
            why = f"the hub cannot be reached ({reason}). Check the network, HF_ENDPOINT and proxies"
        raise CheckpointError(
            f"{label} is not a folder here, the cache does not have it, and {why}, or give a local folder."
        ) from error


def _note_commit(hub_id: str, revision: str, commit: str) -> None:
    """Let the cache know which commit a branch or tag is, as huggingface_hub does when it is asked for one.

    Without a network the name is looked up there. Where it cannot be written (a shared cache, read-only) the files are
    there all the same: logged as a warning.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if revision == commit:
        return
    repository = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=hub_id, repo_type="model")
    note = repository / "refs" / revision
    # Written beside it and put in its place, so that nobody who looks meanwhile sees half of it.
    half = note.with_name(f"{note.name}.{uuid.uuid4().hex}.part")
    try:
        if note.is_file() and note.read_bytes() == commit.encode():
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        try:
            half.write_bytes(commit.encode())
            half.replace(note)
        finally:
            half.unlink(missing_ok=True)
    except OSError as error:
        _LOG.warning(
            "%s: the cache cannot note which commit %s is, so that it may not be found offline: %s",
            hub_id, revision, error,
        )  # fmt: skip


def _check_room(hub_id: str, commit: str, label: str, files: Mapping[str, int]) -> None:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    missing = sum(
        nbytes
        for name, nbytes in files.items()
        if not isinstance(try_to_load_from_cache(hub_id, name, revision=commit), str)
    )
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    blobs = cache / repo_folder_name(repo_id=hub_id, repo_type="model") / "blobs"
    begun = sum(path.stat().st_size for path in blobs.glob("*.incomplete")) if blobs.is_dir() else 0
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if missing and missing - begun + _FREE_BESIDE_BYTES > free:
        raise CheckpointError(
            f"{label} needs {(missing - begun) / 1e9:.2f} GB more in {cache}, and {free / 1e9:.2f} GB are free there. "
            "Free some, or set HF_HOME to a folder on a larger disk."
        )


def _is_away(error: Exception, http_error: type) -> bool:
    """No answer came, or one that says that the hub is down; other errors are answers."""
    response = getattr(error, "response", None)
    if response is not None:
        return bool(response.status_code >= 500)
    return isinstance(error, (http_error, ConnectionError, TimeoutError))


def _explain(error: Exception, label: str) -> str:
    """What the user can do about it."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return f"{label} is gated: accept its terms on the hub's page, and set HF_TOKEN to a token of that account."
    if isinstance(error, RevisionNotFoundError):
        return f"{label}: the hub has the model, but no such revision. Give a branch, a tag or a whole commit id."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{label} is not a folder here, and the hub has no such model, or a private one. Check the spelling; "
            "for a private one set HF_TOKEN."
        )
    if status in (401, 403):
        return f"{label}: the hub refuses access ({status}). Set HF_TOKEN to a token that may read it."
    if isinstance(error, HFValidationError):
        return f"{label} is not a folder here, and no hub id (organisation/name) either: {_first_line(error)}"
    if getattr(error, "errno", None) == 28:
        return f"{label}: the disk is full. What was fetched is kept; free some, or set HF_HOME, and try again."
    return f"{label} could not be fetched from the hub: {_first_line(error)}. What was fetched is kept; try again."


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _is_like(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _escaped(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


@contextlib.contextmanager
def _bars(quiet: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
