"""Read a GGUF file's settings and the location of its tensors. No tensor is read.

What the header says becomes the index that safetensors have too, so that all later code is the same. Blocks are bytes
in it: a tensor of [experts, rows, columns] in Q4_K has the dtype U8 and as its last dimension the bytes of a row;
`kinds` names the quantisation.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from foreroute.checkpoint.gguf_header import MAGIC, GgufHeader, StoredArray, TableLine, parse_array, parse_header
from foreroute.checkpoint.gguf_names import SUFFIX, first_part, part_of
from foreroute.checkpoint.index import CheckpointIndex, TensorEntry
from foreroute.checkpoint.source_files import SourceFile
from foreroute.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError, named
from foreroute.types import round_up
from foreroute.whole_files import check_no_pointer

# Quantisations of experts, facts of the format: (weights, bytes) of a block. kernels/torch/gguf_blocks.py dequantises.
EXPERT_BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36),
}  # fmt: skip


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
        return file.read(len(MAGIC)) == MAGIC
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
    if type(count) is not int:
        raise CorruptCheckpointError(f"{first.folder}: split.count is {count!r:.40}, no number. Download it again.")
    if count <= 1:
        return first
    named_as = part_of(first.folder.name)
    if named_as is None or named_as.count != count:
        raise CorruptCheckpointError(
            f"{first.folder} is one of {count} parts of a model, and not named so. Give all their names back: "
            f"NAME-00001-of-{count:05d}.gguf and so on."
        )
    parts = [first]
    for name in named_as.siblings[1:]:
        part = first.folder.with_name(name)
        if not part.is_file():
            raise CorruptCheckpointError(f"{part} is absent: the model has {count} parts. Download it, too.")
        parts.append(_read_one(part))
    for at, one in enumerate(parts):
        if (one.settings.get("split.no"), one.settings.get("split.count")) != (at, count):
            raise CorruptCheckpointError(f"{one.folder} is not part {at + 1} of {first.folder}. Download it again.")
    return _joined(parts)


def _joined(parts: Sequence[GgufIndex]) -> GgufIndex:
    """All parts as one. Raises CorruptCheckpointError: not as many tensors as the first one says, or one twice."""
    first = parts[0]
    tensors = {name: entry for part in parts for name, entry in part.tensors.items()}
    told = first.settings.get("split.tensors.count", len(tensors))
    if len(tensors) != told or len(tensors) != sum(len(part.tensors) for part in parts):
        raise CorruptCheckpointError(
            f"The parts of {first.folder} hold {len(tensors)} tensors in place of {told!r:.40}: one of them is another "
            "model's. Download them again."
        )
    for part in parts[1:]:
        for name in ("split.tensors.count", "general.architecture", "general.name"):
            found = part.settings.get(name, first.settings.get(name))
            if found != first.settings.get(name):
                raise CorruptCheckpointError(
                    f"{part.folder} is another model's part: its {name} is {found!r:.60}, that of {first.folder} "
                    f"{first.settings.get(name)!r:.60}. Download it again."
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
    with SourceFile(path) as file, wrong:
        header = parse_header(file)
        kinds = {line.name: _kind(path, gguf, line) for line in header.lines}
        tensors = {line.name: _entry(path, gguf, line, kinds[line.name], header.data_start) for line in header.lines}
    _check_kinds(path, gguf, kinds)
    _check_ranges(path, tensors.values(), header, file.stamp.nbytes)
    shapes = {line.name: line.shape for line in header.lines}
    return GgufIndex(path, tensors, header.settings, kinds, shapes, header.arrays, files={str(path): file.stamp})


def read_array(index: GgufIndex, name: str) -> list[Any] | None:
    """The metadata's array `name`, of strings or numbers; None where there is none. Cost: 20 ms for 100,000 strings.

    Raises:
        CorruptCheckpointError: it is no array, or a string in it no UTF-8.
        ReadError: it cannot be read, or the file was replaced or written to meanwhile.
    """
    if name not in index.arrays:
        found = index.settings.get(name)
        if found is not None and not isinstance(found, list):
            raise CorruptCheckpointError(f"{index.folder}: {name} is {found!r:.40}, not a list. Download it again.")
        return found
    wrong = named(f"{index.folder}: {name} is not whole", advice="Download it again.")
    with SourceFile(index.folder, index.files.get(str(index.folder))) as file, wrong:
        return parse_array(file, index.arrays[name])


def _kind(path: Path, gguf: Any, line: TableLine) -> str:
    """The name of a tensor's type."""
    try:
        return str(gguf.GGMLQuantizationType(line.type).name)
    except ValueError:
        raise UnsupportedModelError(
            f"{path}: {line.name} is stored as type {line.type}, which the gguf package {version('gguf')} does not "
            "know. Take a file in a type of docs/formats.md, or a newer package, if it knows more: pip install -U gguf."
        ) from None


def _entry(path: Path, gguf: Any, line: TableLine, kind: str, data_start: int) -> TensorEntry:
    """Where a tensor is. Raises ValueError: there is none of its shape."""
    weights, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if 0 in line.shape or line.shape[-1] % weights:
        raise ValueError(f"{line.name} is {list(line.shape)} in {kind}, of which a row is blocks of {weights}")
    rows = line.shape[:-1] if ".bias" not in line.name else line.shape
    total = math.prod(line.shape) // weights * nbytes
    stored = (*rows, total // math.prod(rows))
    return TensorEntry(line.name, str(path), data_start + line.offset, total, "U8", stored)


def _check_ranges(path: Path, tensors: Iterable[TensorEntry], header: GgufHeader, file_nbytes: int) -> None:
    """Check that tensors lie one behind the other, each aligned, as llama.cpp does, and that the file holds them."""
    due = header.data_start
    for entry in sorted(tensors, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != due:
            raise CorruptCheckpointError(
                f"{path}: {entry.name} begins at byte {entry.offset}, where the tensors before it, and "
                f"{header.alignment} bytes of alignment, make it {due}. Download it again."
            )
        end = entry.offset + entry.nbytes
        if end > file_nbytes:
            raise CorruptCheckpointError(
                f"{path} is not a complete GGUF file: {entry.name} ends at byte {end}, the file at {file_nbytes}. "
                "Download it again."
            )
        due = round_up(end, header.alignment)


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
