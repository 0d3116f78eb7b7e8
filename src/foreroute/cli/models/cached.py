"""Find the models on this machine that have a name: those that ship, and those of the hub's cache. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreroute.checkpoint.gguf_names import part_of
from foreroute.checkpoint.hub.choice import gguf_models
from foreroute.checkpoint.hub.fetch import HubAccess
from foreroute.checkpoint.locate import locate
from foreroute.errors import CheckpointError
from foreroute.shipped import shipped_models
from foreroute.whole_files import beside, read_object


@dataclass(frozen=True)
class NamedModel:
    """A model that commands find by `name`.

    path: of its folder, or of the (first) GGUF file. nbytes: of its weight files. kind: "safetensors" or "GGUF".
    family: transformers' model type; "" for a GGUF file, whose header is not read. where: "ships", "hub cache"
    or "alias of ...". is_whole: whether all files are there. beside: names of packed stores and fitted predictors.
    """

    name: str
    path: Path
    nbytes: int
    kind: str
    family: str
    where: str
    is_whole: bool
    beside: tuple[str, ...]


def named_models(access: HubAccess | None = None) -> list[NamedModel]:
    """All of them, those that ship first; repositories of the cache without weights that are read here are left out."""
    ships = [_folder(name, path, "ships") for name, path in shipped_models().items()]
    return [*ships, *_of_cache((access or HubAccess()).cache)]


def aliased_models(aliases: Mapping[str, str]) -> list[NamedModel]:
    """The models that the `aliases` of the config file stand for; not whole where they are not on this machine."""
    return [_aliased(name, target) for name, target in aliases.items()]


def _aliased(name: str, target: str) -> NamedModel:
    where = f"alias of {target}"
    try:
        path = locate(target, quiet=True, access=HubAccess(local_files_only=True))
    except CheckpointError:
        return NamedModel(name, Path(target).expanduser(), 0, "", "", where, False, ())
    if path.is_dir():
        return _folder(name, path, where)
    part = part_of(path.name)
    files = [path] if part is None else [path.with_name(name) for name in part.siblings]
    nbytes = sum(file.stat().st_size for file in files if file.is_file())
    return NamedModel(name, path, nbytes, "GGUF", "", where, all(file.is_file() for file in files), _beside(path))


def _of_cache(cache: Path) -> Iterator[NamedModel]:
    from huggingface_hub import scan_cache_dir

    if not cache.is_dir():
        return
    for repo in sorted(scan_cache_dir(cache).repos, key=lambda repo: repo.repo_id):
        revisions = sorted(repo.revisions, key=lambda one: ("main" in one.refs, one.last_modified), reverse=True)
        if repo.repo_type == "model" and revisions:
            yield from _of_snapshot(repo.repo_id, Path(revisions[0].snapshot_path))


def _of_snapshot(hub_id: str, folder: Path) -> Iterator[NamedModel]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if any(name.endswith(".safetensors") and "/" not in name for name in names):
        yield _folder(hub_id, folder, "hub cache")
    ggufs = gguf_models(names)
    for model in ggufs:
        files = [folder / name for name in model.files]
        there = [path for path in files if path.is_file()]
        tag = model.quantisation or Path(model.name).name
        unique = sum(other.quantisation == model.quantisation for other in ggufs) == 1
        yield NamedModel(
            f"{hub_id}:{tag if unique else Path(model.name).name}",
            files[0],
            sum(path.stat().st_size for path in there),
            "GGUF",
            "",
            "hub cache",
            len(there) == len(files),
            _beside(files[0]),
        )


def _folder(name: str, folder: Path, where: str) -> NamedModel:
    weights = list(folder.glob("*.safetensors"))
    try:
        config: dict[str, Any] = read_object(folder / "config.json", CheckpointError)
        index = folder / "model.safetensors.index.json"
        listed = read_object(index, CheckpointError) if index.is_file() else {}
    except CheckpointError:
        config, listed = {}, {}
    map_of = listed.get("weight_map")
    shards = {str(shard) for shard in map_of.values()} if isinstance(map_of, dict) else set()
    return NamedModel(
        name,
        folder,
        sum(path.stat().st_size for path in weights),
        "safetensors",
        str(config.get("model_type", "")),
        where,
        bool(weights) and bool(config) and all((folder / shard).is_file() for shard in shards),
        _beside(folder),
    )


def _beside(model: Path) -> tuple[str, ...]:
    """Names of files that `pack` and `fit` made, in the model's folder or next to its GGUF file."""
    first = beside(model, "")
    place, prefix = (first.parent, first.name) if model.is_file() else (model, "")
    return tuple(
        sorted(
            path.name
            for ending in (".foreroute", ".foreroute.safetensors")
            for path in place.glob(f"*{ending}")
            if path.name.startswith(prefix)
        )
    )
