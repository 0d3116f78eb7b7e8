"""What `foreroute rm` removes of the hub's cache, or of the packed stores beside a model; and who has it in use."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreroute.checkpoint.hub.choice import choose_gguf, gguf_models
from foreroute.checkpoint.locate import split_hub_id
from foreroute.checkpoint.records import STORE_NAME, partial_path
from foreroute.errors import CheckpointError, StoreError
from foreroute.shipped import shipped_models
from foreroute.whole_files import Claim, ClaimedError, beside

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

# A download holds its locks for as long as it writes: it is asked for once, and not waited for.
_LOCK_S = 0.05
_ENDING = ".foreroute"
_PROCESSES = Path("/proc")


@dataclass(frozen=True)
class Removal:
    """What is removed: its name for people, the files that hold its `nbytes`. `execute` removes it."""

    what: str
    files: tuple[Path, ...]
    nbytes: int
    execute: Callable[[], None]


def of_cache(model: str, revision: str | None, cache: Path) -> Removal:
    """All that the hub's `cache` has of a hub id, or one revision of it; of a GGUF model that one's files alone.

    Args:
        model: org/name, or org/name:Q4_K_M.
    Raises:
        CheckpointError: the cache has no such model, it is being downloaded, or `model` is none of the cache.
    """
    hub_id, tag = _hub_id(model)
    found = _scan(hub_id, cache)
    revisions = [
        one for repo in found.repos for one in repo.revisions if revision in {None, *one.refs, one.commit_hash}
    ]
    what = model if revision is None else f"{model} at revision {revision}"
    if not revisions:
        raise CheckpointError(f"{what} is not in the hub's cache ({cache}). `foreroute list` shows what is.")
    _refuse_downloads(cache, f"models--{hub_id.replace('/', '--')}", what)
    files = [(_name_in(file, one), file) for one in revisions for file in one.files]
    if tag is not None:
        chosen = _files_of_model({name for name, _ in files}, hub_id, tag, model)
        if chosen is not None:
            own = [file for name, file in files if name in chosen or name.startswith(f"{chosen[0]}.")]
            return _removal(what, own, _delete_files(found, own, hub_id))
    plan = found.delete_revisions(*(one.commit_hash for one in revisions))
    return _removal(what, (file for _, file in files), plan)


def _scan(hub_id: str, cache: Path) -> "HFCacheInfo":
    """What the cache has of one repository. It finds revisions by their commits alone, which copies of a repository
    have in common."""
    from huggingface_hub import scan_cache_dir

    if not cache.is_dir():
        raise CheckpointError(f"{hub_id} is not in the hub's cache: there is no {cache}.")
    found = scan_cache_dir(cache)
    ours = [repo for repo in found.repos if (repo.repo_type, repo.repo_id) == ("model", hub_id)]
    return replace(found, repos=frozenset(ours))


def _files_of_model(names: set[str], hub_id: str, tag: str, model: str) -> Sequence[str] | None:
    """The files of the GGUF model that `tag` means; None where the repository has no other weights."""
    chosen = choose_gguf(names, hub_id, tag, f"{model} in the cache").files
    has_others = len(gguf_models(names)) > 1 or any(name.endswith(".safetensors") for name in names)
    return chosen if has_others else None


def _delete_files(found: "HFCacheInfo", files: Iterable[Any], hub_id: str) -> Any:
    if not hasattr(found, "delete_files"):
        raise CheckpointError(
            f"This huggingface_hub cannot remove single files. Remove all of {hub_id}, or update it: "
            "pip install -U huggingface_hub."
        )
    return found.delete_files(*files)


def _hub_id(model: str) -> tuple[str, str | None]:
    split = split_hub_id(model)
    if model in shipped_models():
        raise CheckpointError(
            f"{model} ships with foreroute: it is removed with it. --packed removes its packed stores."
        )
    if split is None or Path(model).expanduser().exists():
        raise CheckpointError(
            f"{model} is none of the hub's cache, and only its models are removed. --packed removes the packed stores "
            "beside a model; a folder or file of your own is yours to remove."
        )
    return split


def _name_in(file: Any, revision: Any) -> str:
    return Path(file.file_path).relative_to(revision.snapshot_path).as_posix()


def _removal(what: str, files: Iterable[Any], plan: Any) -> Removal:
    paths = tuple(Path(file.file_path).resolve() for file in files)
    return Removal(what, paths, plan.expected_freed_size, plan.execute)


def _refuse_downloads(cache: Path, folder: str, what: str) -> None:
    """Refuse what a download, of any program that uses the cache, is writing."""
    # Re-exported without being declared so.
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    for lock in sorted((cache / ".locks" / folder).glob("*.lock")):
        try:
            with WeakFileLock(lock, timeout=_LOCK_S):
                pass
        except TimeoutError as error:
            raise CheckpointError(f"{what} is being downloaded. Wait for the download, or stop it first.") from error


def stores_beside(model: Path) -> dict[str, Path]:
    """The packed stores beside a model, by the name that --packed takes: "auto" for the one of its own bytes."""
    plain = beside(model, STORE_NAME)
    first = plain.name.removesuffix(_ENDING)
    found = {"auto": plain} if plain.is_file() else {}
    for path in sorted(plain.parent.iterdir()):
        if path.name.startswith(f"{first}.") and path.name.endswith(_ENDING) and path != plain:
            found[path.name[len(first) + 1 : -len(_ENDING)]] = path
    return found


def of_stores(model: Path, name: str, asked: str) -> Removal:
    """The packed store `name` beside a model, or all of them for "all".

    Args:
        asked: the model as it was typed.
    Raises:
        StoreError: there is none, or `foreroute pack` is writing it.
    """
    stores = stores_beside(model)
    paths = list(stores.values()) if name == "all" else [stores[name]] if name in stores else []
    if not paths:
        there = f"There are: {', '.join(stores)}." if stores else "There is none."
        raise StoreError(f"There is no packed store {name} beside {asked}. {there}")
    for path in paths:
        partial = partial_path(path)
        if not partial.is_file():
            continue
        try:
            Claim(partial).close()
        except ClaimedError as error:
            raise StoreError(f"{path} is being written by `foreroute pack`. Stop it first.") from error

    def execute() -> None:
        for path in paths:
            path.unlink()

    nbytes = sum(path.stat().st_size for path in paths)
    return Removal(", ".join(map(str, paths)), tuple(paths), nbytes, execute)


def tells_users() -> bool:
    """Whether this system says which files a process has open: Linux, by /proc."""
    return (_PROCESSES / "self" / "fd").is_dir()


def processes_using(files: Iterable[Path]) -> list[int]:
    """Ids of other processes of this user that have one of `files` open or mapped, where the system says so."""
    wanted = {(status.st_dev, status.st_ino) for path in files if (status := _status(path)) is not None}
    others = [folder for folder in _PROCESSES.glob("[0-9]*") if int(folder.name) != os.getpid()]
    return sorted(int(one.name) for one in others if any(_is_among(link, wanted) for link in _links(one)))


def _links(process: Path) -> Iterator[Path]:
    for name in ("fd", "map_files"):
        try:
            yield from (process / name).iterdir()
        except OSError:  # another user's, or it has ended
            continue


def _is_among(link: Path, wanted: set[tuple[int, int]]) -> bool:
    status = _status(link)
    return status is not None and (status.st_dev, status.st_ino) in wanted


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
