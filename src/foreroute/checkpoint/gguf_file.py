"""Read a GGUF file's settings and the location of its tensors. No tensor is read.

The `gguf` package's reader is converted to the index that safetensors have too, so that all later code is the same. It
treats blocks as bytes: a tensor of [experts, rows, columns] in Q4_K has the dtype U8 and as its last dimension the
bytes of a row; `kinds` names the quantisation.
"""

import math
import re
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from foreroute.checkpoint.gguf_names import SUFFIX, first_part, part_of
from foreroute.checkpoint.index import CheckpointIndex, TensorEntry
from foreroute.checkpoint.source_files import SourceFile
from foreroute.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError, named
from foreroute.whole_files import check_no_pointer

_MAGIC = b"GGUF"
# Quantisations of experts, facts of the format: (weights, bytes) of a block. kernels/torch/gguf_blocks.py dequantises.
EXPERT_BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36),
}  # fmt: skip
# Of arrays that say something of every layer.
_LONGEST = 1024
_NEWER_TYPE = re.compile(r"(\d+)\)? is not a valid GGMLQuantizationType")
_OTHER_VERSION = re.compile(r"version (\d+) which we")


class StoredArray(NamedTuple):
    """Where an array of the metadata lies: first byte, the one behind it, items, the package's number of their type."""

    start: int
    end: int
    num_items: int
    item: int


@dataclass(frozen=True)
class GgufIndex(CheckpointIndex):
    """The tensors of one GGUF file; `folder` is the file.

    settings: the metadata; of arrays those of numbers that are no vocabulary's. kinds: each tensor's quantisation, by
    name. shapes: each tensor's shape in weights, row-major. arrays: where the other arrays lie in `folder`.
    """

    settings: Mapping[str, Any]
    kinds: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    arrays: Mapping[str, StoredArray] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Name of the file format."""
        return "gguf"

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.settings.get("general.architecture"))


def is_gguf(path: Path) -> bool:
    """Whether the file's name ends in .gguf, or its content begins as such a file's (ollama's have no ending)."""
    if not path.is_file():
        return False
    if path.suffix == SUFFIX:
        return True
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC
    return False


def gguf_package() -> Any:
    """Import the `gguf` package.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError("GGUF files need the gguf package, which is not installed: pip install gguf.") from None
    return gguf


def read_gguf(path: Path) -> GgufIndex:
    """Read the header of the GGUF file at `path`, and of its other parts if it is one of several.

    Raises:
        UnsupportedModelError: an unsupported quantisation, or version of the format; named.
        CorruptCheckpointError: not a GGUF file, or truncated; a part is absent, or of another model.
        ReadError: it cannot be read, or was replaced or written to meanwhile.
    """
    first = _read_one(first_part(path))
    count = first.settings.get("split.count", 1)
    if count <= 1:
        return first
    named_as = part_of(first.folder.name)
    if named_as is None or named_as.count != count:
        raise CorruptCheckpointError(
            f"{first.folder} is one of {count} parts of a model, and not named so. Give all their names back: "
            f"NAME-00001-of-{count:05d}.gguf and so on."
        )
    parts = [first]
    for number, name in enumerate(named_as.siblings[1:], 2):
        part = first.folder.with_name(name)
        if not part.is_file():
            raise CorruptCheckpointError(f"{part} is absent: the model has {count} parts. Download it, too.")
        parts.append(_read_one(part))
        if (parts[-1].settings.get("split.no"), parts[-1].settings.get("split.count")) != (number - 1, count):
            raise CorruptCheckpointError(f"{part} is not part {number} of {first.folder}. Download it again.")
    return _joined(parts)


def _joined(parts: Sequence[GgufIndex]) -> GgufIndex:
    """All parts as one. Raises CorruptCheckpointError: not as many tensors as the first one says, or one twice."""
    first = parts[0]
    tensors = {name: entry for part in parts for name, entry in part.tensors.items()}
    told = first.settings.get("split.tensors.count", len(tensors))
    if len(tensors) != told or len(tensors) != sum(len(part.tensors) for part in parts):
        raise CorruptCheckpointError(
            f"The parts of {first.folder} hold {len(tensors)} tensors in place of {told}: one of them is another "
            "model's. Download them again."
        )
    kinds = {name: kind for part in parts for name, kind in part.kinds.items()}
    shapes = {name: shape for part in parts for name, shape in part.shapes.items()}
    files = {path: stamp for part in parts for path, stamp in part.files.items()}
    return GgufIndex(first.folder, tensors, first.settings, kinds, shapes, first.arrays, files=files)


def _read_one(path: Path) -> GgufIndex:
    """Read the header of one file. Raises: see `read_gguf`."""
    gguf = gguf_package()
    check_no_pointer(path)
    wrong = named(f"{path} is not a complete GGUF file", advice="Download it again.")
    with SourceFile(path) as file, wrong, _naming_newer_types(path):
        reader = _reader(gguf, path)
        file.check()
        settings = {
            name: _exact(field.contents())
            for name, field in reader.fields.items()
            if field.types and (field.types[0] != gguf.GGUFValueType.ARRAY or field.types[1:] in _plain_lists(gguf))
        }
        arrays = {
            name: field.parts[-1]
            for name, field in reader.fields.items()
            if field.types == [gguf.GGUFValueType.ARRAY] and isinstance(field.parts[-1], StoredArray)
        }
    # The reader opened the file by name: check that it was the same file.
    SourceFile(path, file.stamp).close()
    tensors: dict[str, TensorEntry] = {}
    kinds: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    file_nbytes = file.stamp.nbytes
    for tensor in reader.tensors:
        name, kind = str(tensor.name), str(tensor.tensor_type.name)
        shape = tuple(int(extent) for extent in reversed(tensor.shape))
        nbytes, offset = int(tensor.n_bytes), int(tensor.data_offset)
        if offset + nbytes > file_nbytes:
            raise CorruptCheckpointError(
                f"{path} is truncated: {name} ends at byte {offset + nbytes}, the file at {file_nbytes}. "
                "Download it again."
            )
        kinds[name], shapes[name] = kind, shape
        rows = shape[:-1] if ".bias" not in name else shape
        stored = (*rows, nbytes // max(1, math.prod(rows)))
        tensors[name] = TensorEntry(name, str(path), offset, nbytes, "U8", stored)
    _check_kinds(path, gguf, kinds)
    return GgufIndex(path, tensors, settings, kinds, shapes, arrays, files={str(path): file.stamp})


def read_array(index: GgufIndex, name: str) -> list[Any] | None:
    """The metadata's array `name`, of strings or numbers; None where there is none. Cost: 50 ms for 100,000 strings.

    Raises:
        CorruptCheckpointError: it is no array, or a string in it no UTF-8.
        ReadError: it cannot be read, or the file was replaced or written to meanwhile.
    """
    if name not in index.arrays:
        found = index.settings.get(name)
        if found is not None and not isinstance(found, list):
            raise CorruptCheckpointError(f"{index.folder}: {name} is {found!r:.40}, not a list. Download it again.")
        return found
    gguf = gguf_package()
    place = index.arrays[name]
    with SourceFile(index.folder, index.files.get(str(index.folder))) as file:
        content = bytes(file.read(place.start, place.end - place.start))
    item = gguf.GGUFValueType(place.item)
    if item != gguf.GGUFValueType.STRING:
        import numpy

        items: list[Any] = numpy.frombuffer(content, gguf.GGUFReader.gguf_scalar_to_np[item], place.num_items).tolist()
        return items
    with named(f"{index.folder}: {name} is not whole", advice="Download it again."):
        return [content[begin:stop].decode() for begin, stop in _strings(memoryview(content), 0, place.num_items)]


@contextmanager
def _naming_newer_types(path: Path) -> Iterator[None]:
    """While inside, the package's error about a type that it does not know says so."""
    try:
        yield
    except ValueError as error:
        version_said = _OTHER_VERSION.search(str(error))
        if version_said is not None:
            raise UnsupportedModelError(
                f"{path} is of version {version_said[1]} of the format, which the gguf package {version('gguf')} does "
                "not read. Take a newer file, or a newer package: pip install -U gguf."
            ) from error
        newer = _NEWER_TYPE.search(str(error))
        if newer is None:
            raise
        raise UnsupportedModelError(
            f"{path}: a tensor is stored as type {newer[1]}, which the gguf package {version('gguf')} does not know. "
            "Take a file in a type of docs/formats.md, or a newer package, if it knows more: pip install -U gguf."
        ) from error


def _plain_lists(gguf: Any) -> list[list[Any]]:
    """The package's types of the items of arrays that are read."""
    return [[kind] for kind in gguf.GGUFReader.gguf_scalar_to_np]


def _reader(gguf: Any, path: Path) -> Any:
    """The package's reader, which passes over arrays: it would make two objects of each of a vocabulary's 300,000
    strings, for seconds, and none is needed here.
    """
    kinds = gguf.GGUFValueType
    plain = gguf.GGUFReader.gguf_scalar_to_np

    class HeaderReader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if self.byte_order == "S":
                raise UnsupportedModelError(
                    f"{path} was written in the byte order of another kind of machine, which is not read. Take a "
                    f"{sys.byteorder}-endian file."
                )
            if raw_type != kinds.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            item, count = kinds(int(self._get(orig_offs, "u4")[0])), int(self._get(orig_offs + 4, "u8")[0])
            start = orig_offs + 12
            if item in plain and count <= _LONGEST:
                return super()._get_field_parts(orig_offs, raw_type)
            if item == kinds.STRING:
                end = _end_of_strings(memoryview(self.data), start, count)
            elif item in plain:
                end = start + count * plain[item]().itemsize
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            if end > len(self.data):
                raise ValueError(f"an array ends at byte {end}, the file at {len(self.data)}")
            return end - orig_offs, [StoredArray(start, end, count, int(item))], [], [kinds.ARRAY]

    return HeaderReader(path)


def _strings(file: memoryview, offset: int, count: int) -> Iterator[tuple[int, int]]:
    """Where each of `count` strings begins and ends, the first of which begins at `offset` with its length."""
    length_at = struct.Struct("=Q").unpack_from
    last = len(file) - 8
    for _ in range(count):
        if offset > last:
            raise ValueError(f"a string begins at byte {offset}, the file ends at {len(file)}")
        begin = offset + 8
        offset = begin + length_at(file, offset)[0]
        yield begin, offset


def _end_of_strings(file: memoryview, offset: int, count: int) -> int:
    """Where `count` strings end that begin at `offset`, each behind its length."""
    for _, end in _strings(file, offset, count):
        offset = end
    return offset


def _exact(value: Any) -> Any:
    """Restore a float32 as it was written: 1e-05, not 9.99999974e-06."""
    import numpy

    if isinstance(value, list):
        return [_exact(one) for one in value]
    return float(str(numpy.float32(value))) if isinstance(value, float) else value


def _check_kinds(path: Path, gguf: Any, kinds: Mapping[str, str]) -> None:
    import numpy

    for name, kind in kinds.items():
        if "_exps." in name and kind not in EXPERT_BLOCKS:
            raise UnsupportedModelError(
                f"{path}: {name} is quantised as {kind}, which is not read; experts are read in "
                f"{', '.join(EXPERT_BLOCKS)}. Take a file with those (Q4_K_M, Q8_0, MXFP4 ...)."
            )
    for kind in sorted(set(kinds.values())):
        number = gguf.GGMLQuantizationType[kind]
        block = numpy.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), dtype=numpy.uint8)
        try:
            if kind not in ("F32", "F16"):
                gguf.quants.dequantize(block, number)
        except NotImplementedError:
            name = next(name for name, found in kinds.items() if found == kind)
            raise UnsupportedModelError(
                f"{path}: {name} is stored as {kind}, which the gguf package cannot dequantise."
            ) from None
