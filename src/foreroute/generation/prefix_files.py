"""Kept beginnings on disk, so that a restarted server has them: a safetensors file for each node of the tree.

Files are written whole or not at all, carry a checksum, and are held to the model and the libraries that computed them.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from foreroute.errors import ForerouteError, PredictorError
from foreroute.generation.kept_layers import LayerStates, Segment
from foreroute.predict.sidecar import read_whole, write_whole
from foreroute.whole_files import Claim, ClaimedError

_LOG = logging.getLogger(__name__)
_VERSION = 1
_SUFFIX = ".safetensors"
_LOCK = "lock"
# A million tokens, of eight digits each.
_MOST_HEADER = 2**24


@dataclass(frozen=True)
class StoredNode:
    """A node of the tree: `ids` from the beginning, those from `start` on its own; used: see prefix_tree.Node."""

    ids: tuple[int, ...]
    start: int
    segment: Segment
    states: LayerStates | None
    used: int

    @property
    def name(self) -> str:
        """Its file's name, by what is in it."""
        of_ids = xxhash.xxh3_128(",".join(map(str, self.ids)).encode()).hexdigest()
        return f"{len(self.ids)}-{self.start}-{'' if self.states is None else 's'}{of_ids}{_SUFFIX}"


class PrefixFiles:
    """The files of one model in a folder that several models may share; one process at a time.

    Args:
        folder: made if missing. identity: of the model, its numbers and the libraries. max_bytes: of the folder.
    Raises:
        ForerouteError: the folder cannot be written, or another process has this model's files.
    """

    def __init__(self, folder: Path, identity: str, max_bytes: int) -> None:
        self._shared, self._max_bytes = folder, max_bytes
        self._identity = f"{_VERSION}|{identity}"
        self._folder = folder / hashlib.sha256(self._identity.encode()).hexdigest()[:24]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._claim = Claim(self._folder / _LOCK)
        except ClaimedError as error:
            raise ForerouteError(
                f"{folder} is in use by another server with this model. Give another --prefix-cache-dir."
            ) from error
        except OSError as error:
            raise ForerouteError(
                f"{folder} cannot be written: {error.strerror}. Give another --prefix-cache-dir, or leave it out."
            ) from error

    def read(self, device: torch.device, most_bytes: int | None = None) -> Iterator[StoredNode]:
        """Read the stored beginnings, shorter beginnings first; a damaged file is left out, with a warning.

        Args:
            most_bytes: of all tensors; a file that would exceed it is not opened. None: the folder's bound.
        """
        left = self._max_bytes if most_bytes is None else most_bytes
        # By the number of tokens, which a name begins with.
        for path in sorted(self._folder.glob(f"*{_SUFFIX}"), key=_num_tokens):
            try:
                tensor_nbytes = _tensor_nbytes(path)
                if tensor_nbytes > left:
                    continue
                left -= tensor_nbytes
                yield self._read(path, device)
            except (PredictorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
                _LOG.warning("%s is damaged and was not read: %s", path, error)

    def write(self, nodes: Sequence[StoredNode], goes_on: Callable[[], bool] = lambda: True) -> bool:
        """Make the files those of these nodes; of other models the oldest are removed first where there is no room.

        What cannot be written, or has no room, is left out with a warning, and what comes after it too.

        Args:
            goes_on: asked before each file.
        Returns:
            False where `goes_on` has ended it.
        """
        names = {node.name for node in nodes}
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if path.name not in names:
                path.unlink(missing_ok=True)
        new = [node for node in nodes if not (self._folder / node.name).exists()]
        own = sum(map(_nbytes_of, nodes)) - sum(map(_nbytes_of, new))
        left = self._make_room(sum(map(_file_nbytes, new))) - own
        for node in new:
            if not goes_on():
                return False
            left -= _nbytes_of(node)
            try:
                if left < 0:
                    raise PredictorError(f"other servers have filled {self._shared}")
                write_whole(self._folder / node.name, *self._packed(node))
            except PredictorError as error:
                _LOG.warning("A prompt was not kept on disk: %s", error)
                break
        return True

    def close(self) -> None:
        """Let other processes have the files."""
        self._claim.close()

    def _packed(self, node: StoredNode) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {
            f"part.{at}.{name}": one.cpu().contiguous()
            for at, layer in enumerate(node.segment.layers)
            for name, one in layer.items()
        }
        about: dict[str, Any] = {"ids": list(node.ids), "start": node.start, "used": node.used, "states": None}
        if node.states is not None:
            held, about["states"] = node.states.packed()
            tensors |= {f"state.{name}": one.cpu().contiguous() for name, one in held.items()}
        about |= {"identity": self._identity, "layers": len(node.segment.layers), "digest": digest_of(tensors, about)}
        return tensors, about

    def _read(self, path: Path, device: torch.device) -> StoredNode:
        tensors, about = read_whole(path)
        if about["identity"] != self._identity:
            raise ValueError("it is another model's")
        said = {name: about[name] for name in ("ids", "start", "used", "states")}
        if about["digest"] != digest_of(tensors, said):
            raise ValueError("its checksum is wrong")
        tensors = {name: one.to(device) for name, one in tensors.items()}
        parts: list[dict[str, torch.Tensor]] = [{} for _ in range(about["layers"])]
        for name in [name for name in tensors if name.startswith("part.")]:
            _, at, tensor_name = name.split(".")
            parts[int(at)][tensor_name] = tensors.pop(name)
        held = {name.removeprefix("state."): one for name, one in tensors.items()}
        states = None if about["states"] is None else LayerStates.unpacked(held, about["states"])
        return StoredNode(tuple(about["ids"]), about["start"], Segment(parts), states, about["used"])

    def _make_room(self, nbytes: int) -> int:
        """Remove the oldest files of other models until `nbytes` more fit; return what the others leave."""
        own = sum(_nbytes(path) for path in self._folder.glob(f"*{_SUFFIX}"))
        others = [path for path in self._shared.glob(f"*/*{_SUFFIX}") if path.parent != self._folder]
        left = self._max_bytes - sum(map(_nbytes, others))
        for path in sorted(others, key=_changed_at):
            if left >= own + nbytes:
                break
            try:
                with Claim(path.parent / _LOCK):
                    size = _nbytes(path)
                    path.unlink(missing_ok=True)
                    left += size
            except (ClaimedError, OSError):
                continue
        return left


def digest_of(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> str:
    """A checksum over a node's tensors, their names and forms, and what is said beside them."""
    digest = xxhash.xxh3_128(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _num_tokens(path: Path) -> tuple[int, str]:
    first = path.name.partition("-")[0]
    return int(first) if first.isdecimal() else 0, path.name


def _nbytes_of(node: StoredNode) -> int:
    return node.segment.nbytes + (0 if node.states is None else node.states.nbytes)


def _file_nbytes(node: StoredNode) -> int:
    """At most what its file takes: the header has its tokens, and names of tensors."""
    tensors = sum(map(len, node.segment.layers))
    return _nbytes_of(node) + 12 * len(node.ids) + 200 * tensors + 4096


def _tensor_nbytes(path: Path) -> int:
    """Bytes of a file's tensors, by its length.

    Raises:
        ValueError: it is none of ours. OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > _MOST_HEADER:
        raise ValueError("its header is too long")
    return max(path.stat().st_size - header - 8, 0)


def _nbytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _changed_at(path: Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0
