"""Index the tensors of a safetensors checkpoint from its headers alone.

No tensor is read: a header has name, dtype, shape and byte range, and all faults of a folder (absent shards, truncated
files, overlapping ranges, pickles in place of safetensors) are found here, before any work.
"""

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import xxhash

from foreroute.checkpoint.source_files import FileStamp, SourceFile
from foreroute.errors import CheckpointError, CorruptCheckpointError, ForerouteError
from foreroute.whole_files import parse_object, read_object, refuse_pointer

# transformers' names for the single weights file, and for the index of several.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Bytes per item of the dtypes that safetensors can hold and that an expert may be stored in.
ITEMSIZE: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
# Spelling of safetensors' dtypes; those that are not in ITEMSIZE cannot be experts.
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,31}")
# Per file; the largest models have this many in all their files together.
_MOST_TENSORS = 2**18
_MOST_DIMS, _MOST_BYTES = 32, 2**63
_INDEX = "a safetensors index"
_POINTER_START, _POINTER_HEAD_BYTES = b"version ", 1024
_FINGERPRINT_SAMPLES = 64
_FINGERPRINT_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor: `nbytes` bytes of `path` from `offset` (absolute, in bytes), row-major, of `dtype`."""

    name: str
    path: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def merged(entry: TensorEntry, ndim: int) -> TensorEntry:
    """Merge the last dimensions of `entry` into one, so that it has `ndim` of them (a scalar has one)."""
    shape = entry.shape or (1,)
    if len(shape) > ndim:
        shape = (*shape[: ndim - 1], math.prod(shape[ndim - 1 :]))
    return replace(entry, shape=shape)


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint folder by name, and their files.

    files: each file's stamp from when its header was read; later reads are checked against it.
    """

    folder: Path
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileStamp] = field(default_factory=dict, kw_only=True)

    @property
    def kind(self) -> str:
        """Name of the file format."""
        return "safetensors"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def fingerprint(self) -> str:
        """A short hash that identifies this checkpoint, also among fine-tunes of the same shape.

        Covers every tensor's name, dtype and shape, and 4 KiB from the middle of 64 tensors spread over the names.
        Cost: 64 small reads.

        Raises:
            ChangedFileError: a file changed since its header was read. ReadError: it cannot be read.
        """
        digest = xxhash.xxh3_128()
        names = sorted(self.tensors)
        for name in names:
            entry = self.tensors[name]
            digest.update(f"{name}|{entry.dtype}|{entry.shape}\n".encode())
        step = max(1, len(names) // _FINGERPRINT_SAMPLES)
        for name in names[::step]:
            entry = self.tensors[name]
            middle = entry.nbytes // 2
            with SourceFile(entry.path, self.files.get(entry.path)) as file:
                digest.update(file.read(entry.offset + middle, min(_FINGERPRINT_SAMPLE_BYTES, entry.nbytes - middle)))
        return digest.hexdigest()


def named_weights(folder: Path) -> str | None:
    """The file in `folder` that config.json names as `transformers_weights`; None if it names none.

    Raises:
        CheckpointError: the named file is not a safetensors file or index, or lies elsewhere.
    """
    try:
        named = read_object(folder / "config.json").get("transformers_weights")
    except (OSError, ForerouteError):
        return None  # reading the model's config reports the fault
    if named is None:
        return None
    if not str(named).endswith((".safetensors", ".safetensors.index.json")) or Path(str(named)).name != named:
        raise CheckpointError(
            f"{folder / 'config.json'} names {named!r} as transformers_weights: no safetensors file of that folder."
        )
    return str(named)


def read_sharded(index_file: Path) -> CheckpointIndex:
    """Read the headers of all shards that `index_file` names.

    As in transformers, the index only says which shards exist; all tensors in them count.

    Raises:
        CorruptCheckpointError: a shard is absent or malformed, lacks tensors of the index, or holds one that another
            shard holds too.
    """
    folder = index_file.parent
    weight_map = shards_of(read_object(index_file, what=_INDEX), str(index_file))
    shard_names = sorted(set(weight_map.values()))
    missing = [name for name in shard_names if not (folder / name).is_file()]
    if missing:
        raise CorruptCheckpointError(
            f"{folder}: {len(missing)} of {len(shard_names)} shards are missing, first {missing[0]}. Download them."
        )
    stored: dict[str, TensorEntry] = {}
    files: dict[str, FileStamp] = {}
    for shard_name in shard_names:
        entries, files[str(folder / shard_name)] = read_header(folder / shard_name)
        for entry in entries:
            _refuse_twice(stored.get(entry.name), entry)
            stored[entry.name] = entry
    absent = [
        name
        for name, shard in sorted(weight_map.items())
        if name not in stored or Path(stored[name].path) != folder / shard
    ]
    if absent:
        raise CorruptCheckpointError(
            f"{index_file} names {absent[0]} in {weight_map[absent[0]]}, which does not hold it "
            f"({len(absent)} such tensors). The index and the shards are of different downloads."
        )
    return CheckpointIndex(folder, stored, files=files)


def _refuse_twice(earlier: TensorEntry | None, entry: TensorEntry) -> None:
    if earlier is not None:
        raise CorruptCheckpointError(
            f"{entry.name} is in {earlier.path} and in {entry.path}: programs differ in which of them they take. "
            "Download the model again into an empty folder."
        )


def read_single(path: Path) -> CheckpointIndex:
    """Read the header of a checkpoint that is one file."""
    entries, stamp = read_header(path)
    return CheckpointIndex(path.parent, {entry.name: entry for entry in entries}, files={str(path): stamp})


def shards_of(
    index: Mapping[str, Any], name: str, error: type[ForerouteError] = CorruptCheckpointError
) -> dict[str, str]:
    """Check a safetensors index: it must map tensor names to names of files in its own folder. Returns the map.

    Args:
        name: of the index, for the message.
    Raises:
        error: it does not.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        reason = "it has no weight_map"
    elif not weight_map:
        reason = "its weight_map is empty"
    else:
        unfit = next((at for at, file in weight_map.items() if not _is_file_name(file)), None)
        if unfit is None:
            return weight_map
        reason = f"weight_map has {weight_map[unfit]!r:.100} for {unfit}, which is not a file name"
    raise error(f"{name} is not {_INDEX} ({reason}). Download it again.")


def _is_file_name(value: Any) -> bool:
    """Whether it is a path within the folder: an index must not choose other files of this machine."""
    if not isinstance(value, str) or not 0 < len(value) < 1024 or "\0" in value:
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""


def read_header(path: str | Path) -> tuple[list[TensorEntry], FileStamp]:
    """Read the tensors of one safetensors file, in file order, and its stamp.

    Raises:
        CorruptCheckpointError: it is truncated, a git-LFS pointer, its header is malformed, ranges overlap, or the
            length of a range does not fit its dtype and shape.
        ReadError: it cannot be read, or was written to meanwhile.
    """
    path = Path(path)
    with SourceFile(path) as file:
        raw_header = _raw_header(path, file)
    header = parse_object(raw_header, f"{path} has a malformed header")
    if len(header) > _MOST_TENSORS:
        raise CorruptCheckpointError(f"{path} has {len(header):,} tensors; no checkpoint file has that many.")
    data_start = 8 + len(raw_header)
    entries = sorted(_entries(path, header, data_start), key=lambda entry: (entry.offset, entry.nbytes))
    _check_ranges(path, entries, data_start, file.stamp.nbytes)
    return entries, file.stamp


def _raw_header(path: Path, file: SourceFile) -> bytes:
    prefix, file_nbytes = bytes(file.read(0, 8)), file.stamp.nbytes
    refuse_pointer(path, prefix + bytes(file.read(8, _POINTER_HEAD_BYTES)) if prefix == _POINTER_START else prefix)
    if len(prefix) < 8:
        raise CorruptCheckpointError(f"{path} has {file_nbytes} bytes: too short for a safetensors file.")
    (header_nbytes,) = struct.unpack("<Q", prefix)
    if header_nbytes > min(_MAX_HEADER_BYTES, file_nbytes - 8):
        raise CorruptCheckpointError(
            f"{path} says its header has {header_nbytes} bytes, the file has {file_nbytes}: truncated, or not a "
            "safetensors file. Download it again."
        )
    return bytes(file.read(8, header_nbytes))


def _entries(path: Path, header: dict[str, Any], data_start: int) -> Iterator[TensorEntry]:
    for name, info in header.items():
        if name == "__metadata__":
            if not isinstance(info, dict) or not all(isinstance(value, str) for value in info.values()):
                raise CorruptCheckpointError(f"{path} has a malformed header (__metadata__ is not a map of strings).")
            continue
        wrong = _why_no_tensor(info)
        if wrong:
            raise CorruptCheckpointError(f"{path} has a malformed header ({name}: {wrong}). Download it again.")
        begin, end = info["data_offsets"]
        yield TensorEntry(name, str(path), data_start + begin, end - begin, info["dtype"], tuple(info["shape"]))


def _why_no_tensor(info: Any) -> str:
    """What is wrong with a tensor's entry in a header; "" if nothing."""
    if not isinstance(info, dict):
        return "it is not an object"
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        return f"its dtype is {dtype!r:.40}"
    if not _is_list_of_whole(shape, _MOST_DIMS, least=0):
        return f"its shape is {shape!r:.40}"
    # A range before the data is found below, as it overlaps another tensor.
    if not _is_list_of_whole(offsets, 2, least=-_MOST_BYTES) or offsets != sorted(offsets) or len(offsets) < 2:
        return f"its data_offsets are {offsets!r:.40}"
    return ""


def _is_list_of_whole(values: Any, most: int, least: int) -> TypeGuard[list[int]]:
    if not isinstance(values, list) or len(values) > most:
        return False
    return all(type(value) is int and least <= value < _MOST_BYTES for value in values)


def _check_ranges(path: Path, entries: list[TensorEntry], data_start: int, file_nbytes: int) -> None:
    previous_end, previous_name = data_start, "the header"
    for entry in entries:
        itemsize = ITEMSIZE.get(entry.dtype)
        if itemsize is not None and entry.nbytes != math.prod(entry.shape) * itemsize:
            raise CorruptCheckpointError(
                f"{path}: {entry.name} is {entry.dtype} {list(entry.shape)} but has {entry.nbytes} bytes "
                f"in place of {math.prod(entry.shape) * itemsize}."
            )
        if entry.offset < previous_end:
            raise CorruptCheckpointError(f"{path}: {entry.name} overlaps {previous_name}. Download it again.")
        if entry.offset > previous_end:
            raise CorruptCheckpointError(
                f"{path}: no tensor has the {entry.offset - previous_end} bytes between {previous_name} and "
                f"{entry.name}, which safetensors does not allow. Download it again."
            )
        previous_end, previous_name = entry.offset + entry.nbytes, entry.name
    if previous_end > file_nbytes:
        raise CorruptCheckpointError(
            f"{path} is truncated: {previous_name} ends at byte {previous_end}, the file at {file_nbytes}. "
            "Download it again."
        )
    if previous_end < file_nbytes:
        raise CorruptCheckpointError(
            f"{path} goes on for {file_nbytes - previous_end} bytes after {previous_name}, its last tensor. "
            "Download it again."
        )
