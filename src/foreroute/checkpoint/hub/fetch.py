"""Download a checkpoint from the hub: only the files that are read here, by huggingface_hub into its own cache.

Its cache, progress bars, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE work as everywhere. This module chooses the files:
the one file (or those that the index names), config, tokenizer and chat template, from the top folder only; or one GGUF
model, whole (choice.py). Pickles, other formats and second copies ("original/", "consolidated") are not downloaded.
"""

import contextlib
import glob
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from foreroute.checkpoint.hub.choice import choose_gguf, has_only_gguf, no_weights, settings_beside, tokenizer_beside
from foreroute.checkpoint.index import INDEX, SINGLE, named_weights, shards_of
from foreroute.errors import CheckpointError
from foreroute.units import format_memory
from foreroute.whole_files import read_object

_FREE_BESIDE_BYTES = 64 * 2**20
_KEPT = "Files that were fetched whole are kept; one that was cut off begins anew"


@dataclass(frozen=True)
class HubAccess:
    """How to access the hub, where it differs from the environment.

    token: of an account, or True for the saved one. local_files_only: use the cache alone. cache_dir: its folder.
    """

    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    cache_dir: Path | None = None

    @property
    def cache(self) -> Path:
        """The cache folder."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE).expanduser() if self.cache_dir is None else self.cache_dir


_AS_SET = HubAccess()


@dataclass(frozen=True)
class _HubFile:
    """A file of a repository. blob: the hash of its content, its name in the cache at every commit; "" if unknown."""

    nbytes: int
    blob: str


def fetch(
    hub_id: str,
    revision: str | None = None,
    *,
    tag: str | None = None,
    quiet: bool = False,
    access: HubAccess = _AS_SET,
) -> Path:
    """Download `hub_id` at `revision` (branch, tag or commit; None for the main branch) and return its local folder.

    With a `tag` it is the GGUF model that `tag` names (see `choose_gguf`), and what is returned is its (first) file. So
    it is without one where the repository has GGUF files alone. Files in the cache are not downloaded again; one whose
    download was cut off begins anew. Without a network, or with HF_HUB_OFFLINE, the cache is used as it is.

    Args:
        tag: name of a quantisation, or of a file. quiet: no progress bars. access: token and cache; those of the
            environment by default.
    Raises:
        UnsupportedModelError: it has neither safetensors nor GGUF files.
        CheckpointError: no such repository, revision or tag, or several models fit; no access, no network, or too
            little disk; says which.
    """
    from huggingface_hub import constants, resolve_revision, snapshot_download

    label = (hub_id if tag is None else f"{hub_id}:{tag}") + ("" if revision is None else f" at revision {revision}")
    is_offline = constants.HF_HUB_OFFLINE or access.local_files_only
    told: dict[str, Any] = {"token": access.token, "cache_dir": access.cache}
    with _bars(quiet), _explained(label, access):
        # Resolve once and use the commit from here on: a branch may move after its files were listed.
        commit = resolve_revision(hub_id, revision=revision, local_files_only=is_offline, **told).resolved
        files = None if is_offline else _files(hub_id, commit, access)
        if files is None:
            return _cached(hub_id, commit, tag, label, access)
        wanted, opened = _wanted(hub_id, commit, tag, label, files, access)
        _check_room(hub_id, commit, label, {name: files[name] for name in wanted}, access.cache)
        patterns = [glob.escape(name) for name in wanted]
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=patterns, **told)) / opened


def _files(hub_id: str, commit: str, access: HubAccess) -> dict[str, _HubFile] | None:
    """Every file in the repository by its path; None if the hub cannot be reached."""
    from huggingface_hub import HfApi

    try:
        info = HfApi(token=access.token).model_info(hub_id, revision=commit, files_metadata=True)
    except (_http_error(), OSError) as error:
        if _is_away(error):
            return None
        raise
    return {
        entry.rfilename: _HubFile(int(entry.size or 0), str((entry.lfs.sha256 if entry.lfs else entry.blob_id) or ""))
        for entry in info.siblings or ()
    }


def _cached(hub_id: str, commit: str, tag: str | None, label: str, access: HubAccess) -> Path:
    """What `fetch` returns, from the cache alone; chosen from all files of the repository, as the cache notes them."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    find = partial(snapshot_download, hub_id, revision=commit, cache_dir=access.cache, local_files_only=True)
    folder = Path(find(allow_patterns=[]))
    try:
        names = [file.path for file in get_cached_repo_tree(hub_id, revision=commit, cache_dir=access.cache)]
    except CachedRepoTreeNotFoundError:
        # Other programs fill the cache without a list.
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        label = f"{label} in the cache"
        if tag is None and has_only_gguf(names):
            raise CheckpointError(
                f"{label} has a GGUF model, and what else the repository has is not known there. Name the model: "
                f"{hub_id}:Q4_K_M, if that is its quantisation."
            ) from None
    if tag is None and not has_only_gguf(names):
        # read_index finds out whether all shards are present.
        return Path(find(allow_patterns=["config.json", INDEX]))
    files = choose_gguf(names, hub_id, tag, label).files
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise LocalEntryNotFoundError(f"no answer, and {absent[0]} is not in the cache")
    return folder / files[0]


def _wanted(
    hub_id: str, commit: str, tag: str | None, label: str, names: Collection[str], access: HubAccess
) -> tuple[list[str], str]:
    """The repository's files to download, and which of them is opened: a GGUF file, or "" for the folder."""
    if tag is not None or has_only_gguf(names):
        model = choose_gguf(names, hub_id, tag, label)
        weights, beside, opened = list(model.files), tokenizer_beside(names, model), model.files[0]
    else:
        weights, beside, opened = _weights(hub_id, commit, label, names, access), settings_beside(names), ""
    absent = [name for name in weights if name not in names]
    if absent:
        raise CheckpointError(f"{label} names {absent[0]}, which is not in the repository.")
    return [*beside, *weights], opened


def _weights(hub_id: str, commit: str, label: str, names: Collection[str], access: HubAccess) -> list[str]:
    """Choose the weight files as transformers and locate.py do: the one that the config names, else the single file,
    else those of the index. Where there are several choices, the other files may be out of date."""
    from huggingface_hub import hf_hub_download

    candidates = [name for name in (SINGLE, INDEX) if name in names]
    told: dict[str, Any] = {"revision": commit, "token": access.token, "cache_dir": access.cache}
    if "config.json" in names and any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        config_file = hf_hub_download(hub_id, "config.json", **told)
        candidates = [name for name in (named_weights(Path(config_file).parent), *candidates) if name is not None]
    if not candidates:
        raise no_weights(hub_id, label, sorted(names))
    first = candidates[0]
    if first not in names or not first.endswith(".index.json"):
        return [first]
    index = read_object(Path(hf_hub_download(hub_id, first, **told)), CheckpointError, "a safetensors index")
    return sorted(set(shards_of(index, f"{label}: its {first}", CheckpointError).values()))


def _check_room(hub_id: str, commit: str, label: str, files: Mapping[str, _HubFile], cache: Path) -> None:
    """Check the disk before a download: huggingface_hub finds out only when it is full. Raises CheckpointError.

    Partial files in the cache (*.incomplete) are left out of it: huggingface_hub does not continue them.
    """
    from huggingface_hub import try_to_load_from_cache

    blobs = cache / f"models--{hub_id.replace('/', '--')}" / "blobs"
    # What the cache has of another commit is linked, not downloaded.
    missing = sum(
        file.nbytes
        for name, file in files.items()
        if not (blobs / file.blob).is_file()
        and not isinstance(try_to_load_from_cache(hub_id, name, cache, commit), str)
    )
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if missing and missing + _FREE_BESIDE_BYTES > free:
        raise CheckpointError(
            f"{label} needs {format_memory(missing, round_up=True)} more in {cache}, and {format_memory(free)} are "
            "free there. Free some, or set HF_HOME to a folder on a larger disk."
        )


@contextlib.contextmanager
def _explained(label: str, access: HubAccess) -> Iterator[None]:
    """Turn huggingface_hub's errors into CheckpointError, which says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionResolutionError

    try:
        yield
    except (RevisionResolutionError, LocalEntryNotFoundError) as error:
        cause = _first_line(error.__cause__ or error)
        why = f"the hub cannot be reached ({cause}). Check the network, HF_ENDPOINT and proxies"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set. Unset it to download the model"
        elif access.local_files_only:
            why = "local_files_only is set. Leave it out to download the model"
        raise CheckpointError(
            f"{label} is not a folder here, the cache does not have it, and {why}, or give a local folder."
        ) from error
    except (_http_error(), OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(_advice(error, label)) from error


def _http_error() -> type[Exception]:
    """The base of all HTTP library errors, which differs between major versions of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast(type[Exception], HfHubHTTPError.__mro__[1])


def _is_away(error: Exception) -> bool:
    """Whether there was no answer, or one that says that the hub is down."""
    response = getattr(error, "response", None)
    if response is not None:
        return bool(response.status_code >= 500)
    return isinstance(error, (_http_error(), ConnectionError, TimeoutError))


def _advice(error: Exception, label: str) -> str:
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
        return f"{label}: the disk is full. Free some, or set HF_HOME, and try again. {_KEPT}."
    return f"{label} could not be fetched from the hub: {_first_line(error)}. Try again. {_KEPT}."


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


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
