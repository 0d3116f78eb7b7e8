"""The packed store: one file, one page-aligned record per expert, each with a checksum.

    magic (8 bytes) | header bytes (u64) | header checksum (u64) | header (JSON) | 0..
    page-aligned: checksum table, one xxh3-64 per record (u64; 0 = not written yet)
    page-aligned: records, `record_stride` bytes each, in key order, laid out like a slot, so that a read needs no copy
    page-aligned, if the store has dense weights: their blocks, a record of its own length for each matrix

A file with the final name is complete: it is written under another one (store_writer.py).
"""

import contextlib
import dataclasses
import glob
import itertools
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from foreroute.checkpoint.codecs import (
    CODECS,
    EARLIER,
    QUANTS,
    STORED,
    describe,
    encoded_table,
    interleaved,
    orders_of,
    retype,
)
from foreroute.checkpoint.gguf_file import EXPERT_BLOCKS
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.quantised_layout import in_blocks
from foreroute.checkpoint.source_files import FileStamp, SourceFile
from foreroute.errors import ChecksumError, StoreError
from foreroute.types import BLOCK_BYTES, QUANTISED_TYPES, Copy, ExpertReads, Read, round_up
from foreroute.whole_files import beside, parse_object, refuse_pointer

STORE_NAME = "experts.foreroute"
# In the names of stores that hold dense weights: q4_k-dense-q8_0.
_DENSE = "dense-"
_PARTIAL_SUFFIX = ".partial"
MAGIC = b"FOREROUT"
PREAMBLE = struct.Struct("<8sQQ")
_VERSION = 1
_PACK_AGAIN = "Remove it and run `foreroute pack` again."
_MOST_HEADER_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class DenseRecords:
    """Dense weights that a store holds too, all in one type of blocks.

    kind: the type, as GGUF names it; "" where there are none. shapes: by stored name, rows and columns [out, in].
    """

    kind: str = ""
    shapes: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> list[int]:
        """Bytes of each matrix, in the order of their records."""
        return [rows * self.row_bytes(columns) for rows, columns in self.shapes.values()]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights."""
        weights, nbytes = EXPERT_BLOCKS[self.kind]
        return columns // weights * nbytes

    def describe(self) -> dict[str, Any]:
        """As a store's header has it."""
        return {"type": self.kind, "matrices": [[name, *shape] for name, shape in self.shapes.items()]}


NO_DENSE = DenseRecords()


def store_header(table: ExpertTable, codec: str, dense: DenseRecords = NO_DENSE) -> bytes:
    """The header, JSON, of a store of `table`'s experts in `codec`, and of `dense`; equal where two hold the same."""
    described: dict[str, Any] = {
        "version": _VERSION,
        "codec": codec,
        "fingerprint": table.index.fingerprint(),
        "record_stride": table.slot_bytes,
        "layers": [describe(layer) for layer in table.layers],
    }
    if orders := orders_of(table):
        described["orders"] = orders
    if dense.kind:
        described["dense"] = dense.describe()
    return json.dumps(described, sort_keys=True).encode()


@dataclasses.dataclass(frozen=True)
class StoreGeometry:
    """Places in a store whose header has `header_nbytes` bytes.

    offsets: where each record begins, those of experts first; and where the file ends.
    """

    table_start: int
    offsets: Sequence[int]

    @classmethod
    def of(cls, header_nbytes: int, table: ExpertTable, dense: DenseRecords) -> "StoreGeometry":
        """Those of a store of `table`'s experts and `dense`."""
        nbytes = [table.slot_bytes] * table.total_slots + [round_up(one) for one in dense.nbytes]
        table_start = round_up(PREAMBLE.size + header_nbytes)
        data_start = round_up(table_start + 8 * len(nbytes))
        return cls(table_start, list(itertools.accumulate(nbytes, initial=data_start)))

    @property
    def num_records(self) -> int:
        """Records of experts and of dense matrices."""
        return len(self.offsets) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.offsets[-1]


class PackedStore:
    """A complete store of the current model's experts; its reads replace those of the checkpoint.

    Args:
        path: the store's file. table: the model's experts as the checkpoint stores them; the store must match it.
    Attributes:
        codec: a name of codecs.py. table: the experts as the store holds them. dense: the dense weights that it holds.
        files: the file's stamp from when its header was read, by its path.
    Raises:
        StoreError: not a store, a damaged header, of another model or version, or incomplete.
    """

    def __init__(self, path: Path, table: ExpertTable) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.files = {str(path): (stamp := FileStamp.of(file.fileno()))}
                stored = read_store_header(path, file.read(PREAMBLE.size), file.read)
                self._take_header(stored, table)
                file.seek(self._geometry.table_start)
                num_records = self._geometry.num_records
                raw_table = file.read(8 * num_records)
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}.") from error
        expected_nbytes = self._geometry.nbytes
        if stamp.nbytes != expected_nbytes or len(raw_table) != 8 * num_records:
            raise StoreError(
                f"{path} has {stamp.nbytes} bytes in place of {expected_nbytes}: half written or truncated. "
                + _PACK_AGAIN
            )
        self._checksums = struct.unpack(f"<{num_records}Q", raw_table)
        unwritten = self._checksums.count(0)
        if unwritten:
            raise StoreError(f"{path} is half written: {unwritten} of {num_records} records are missing. {_PACK_AGAIN}")

    @property
    def digest(self) -> str:
        """A short hash of the checksums of all records."""
        return xxhash.xxh3_128(repr(self._checksums).encode()).hexdigest()

    def _take_header(self, stored: bytes, table: ExpertTable) -> None:
        described = _described(self.path, stored)
        self.codec: str = described["codec"]
        _check_codec(self.path, self.codec)
        self.dense = _dense_of(self.path, described["dense"])
        orders = described["orders"]
        if self.codec == STORED:  # `pack` lays MXFP4 out in blocks; earlier versions did not
            table = interleaved(retype(table, described.get("layers")), orders)
            in_its_blocks = interleaved(in_blocks(table), orders)
            table = in_its_blocks if store_header(in_its_blocks, STORED, self.dense) == stored else table
        else:
            table = interleaved(encoded_table(table, CODECS[self.codec]), orders)
        header = store_header(table, self.codec, self.dense)
        _check_same_model(self.path, stored, header)
        self.table = table
        self._layers = table.layers
        self._first_record = _first_records(table)
        self._geometry = StoreGeometry.of(len(header), table, self.dense)

    def reads_of(self, table: ExpertTable) -> Callable[[int], ExpertReads]:
        """A function from flat keys of `table` to the one read that fills a slot.

        Args:
            table: the model's experts; its layers may be in another order than those of the store.
        """
        position = {layer.name: at for at, layer in enumerate(self._layers)}

        def reads(key: int) -> ExpertReads:
            layer, expert = table.expert_id(key)
            stored_layer = position[table.layers[layer].name]
            record = self._first_record[stored_layer] + expert
            nbytes = self._layers[stored_layer].layout.record_bytes
            whole = Copy(0, 0, 1, nbytes, 1, nbytes, 1)
            return (Read(str(self.path), self._geometry.offsets[record], nbytes, (whole,), self._checksums[record]),)

        return reads

    def read_dense(self, name: str, into: memoryview) -> None:
        """Read the blocks of the dense weight with the stored name `name` into a buffer of their length, in bytes.

        Raises:
            ReadError: it cannot be read, or the file has changed. ChecksumError: other bytes than were packed.
        """
        record = self.table.total_slots + list(self.dense.shapes).index(name)
        with SourceFile(self.path, self.files[str(self.path)]) as file:
            file.read_into(self._geometry.offsets[record], into)
        if xxhash.xxh3_64_intdigest(into) != self._checksums[record]:
            raise ChecksumError(
                f"{self.path}: the blocks of {name} are not those that were packed. Pack the model again (foreroute "
                "pack --force); if that happens twice, check the disk."
            )


def open_store(folder: Path, asked: str, table: ExpertTable) -> PackedStore | None:
    """Open the packed store: beside the checkpoint in `folder` ("auto"), none ("no"), or at the path `asked`.

    A quantised store changes the output, so that it is used only if `asked` is its name ("q4_k", "q4_k-dense-q8_0") or
    its path.

    Raises:
        StoreError: a named store is absent, or it cannot be used with `table`. It is never ignored silently: "no" reads
            the safetensors.
    """
    if asked == "no":
        return None
    path = _path_of(folder, asked)
    if not path.is_file():
        if asked == "auto":
            return None
        codec, dense = _parsed(EARLIER.get(asked, (asked,))[0])
        how = " ".join(f"--{flag} {kind}" for flag, kind in (("quant", codec), ("dense", dense)) if kind)
        how = how or f"--out {asked}"
        begun = " That continues the one that was begun." if partial_path(path).is_file() else ""
        raise StoreError(f"{path} does not exist. Make it with `foreroute pack {folder} {how}`.{begun}")
    return PackedStore(path, table)


def quantised_beside(folder: Path, table: ExpertTable) -> list[str]:
    """The names, for `open_store`, of quantised stores of `table`'s experts beside the checkpoint in `folder`."""
    first, suffix = beside(folder, STORE_NAME).name.removesuffix(".foreroute"), ".foreroute"
    found = []
    for path in sorted(beside(folder, STORE_NAME).parent.glob(f"{glob.escape(first)}.*{suffix}")):
        name = path.name[len(first) + 1 : -len(suffix)]
        if any(_parsed(name)):
            # One of other weights, or half written, is none.
            with contextlib.suppress(StoreError):
                PackedStore(path, table)
                found.append(name)
    return found


def _path_of(folder: Path, asked: str) -> Path:
    """The file that `asked` means: a codec's beside the checkpoint, or the one at a path."""
    if asked in EARLIER:
        # By the names of earlier versions: what `pack` makes of them now, before a store that is not read any more.
        found = [beside(folder, store_name(name)) for name in EARLIER[asked]]
        old = beside(folder, store_name(asked))
        return next((path for path in (*found, old) if path.is_file()), found[0])
    if any(_parsed(asked)):
        return beside(folder, _file_name(asked))
    path = beside(folder, STORE_NAME) if asked in ("auto", STORED) else Path(asked)
    return path / STORE_NAME if path.is_dir() else path


def packed_as(codec: str, dense: str | None = None) -> str:
    """The name by which --packed finds a store of this codec, with dense weights in the type `dense`; "" needs none."""
    return "-".join([codec] * (codec != STORED) + [f"{_DENSE}{dense}"] * bool(dense))


def store_name(codec: str, dense: str | None = None) -> str:
    """Name of a store's file beside the checkpoint; arguments as of `packed_as`."""
    return _file_name(packed_as(codec, dense))


def _file_name(packed: str) -> str:
    stem, suffix = STORE_NAME.split(".")
    return f"{stem}.{packed}.{suffix}" if packed else STORE_NAME


def _parsed(packed: str) -> tuple[str, str]:
    """Codec and type of dense weights by a name of `packed_as`, "" for none; ("", "") where it is no such name."""
    codec, _, dense = packed.partition(_DENSE)
    codec = codec.removesuffix("-")
    is_name = (not codec or codec in QUANTS) and (not dense or (dense.islower() and dense.upper() in QUANTISED_TYPES))
    return (codec, dense) if is_name and packed == packed_as(codec or STORED, dense) else ("", "")


def partial_path(path: Path) -> Path:
    """Path of the unfinished store that will become `path`."""
    return path.with_name(path.name + _PARTIAL_SUFFIX)


def _first_records(table: ExpertTable) -> Sequence[int]:
    return list(itertools.accumulate((layer.num_experts for layer in table.layers), initial=0))[:-1]


def read_store_header(path: Path, preamble: bytes, read: Callable[[int], bytes]) -> bytes:
    """Return the header behind `preamble`, the first PREAMBLE.size bytes of `path`; `read` gives the next bytes.

    Raises:
        StoreError: not a store, or a damaged header.
    """
    if preamble.startswith(b"version "):
        refuse_pointer(path, preamble + read(BLOCK_BYTES), StoreError)
    if len(preamble) != PREAMBLE.size or preamble[:8] != MAGIC:
        raise StoreError(f"{path} is not a packed store. Remove it, or make it with `foreroute pack`.")
    _, header_nbytes, checksum = PREAMBLE.unpack(preamble)
    header = read(header_nbytes) if header_nbytes <= _MOST_HEADER_BYTES else b""
    if len(header) != header_nbytes or xxhash.xxh3_64_intdigest(header) != checksum:
        raise StoreError(f"{path} has a damaged header. {_PACK_AGAIN}")
    return header


def _described(path: Path, stored: bytes) -> dict[str, Any]:
    """Parse a header; its codec and its orders are there and have their types."""
    parsed = parse_object(stored, f"{path} has a damaged header", StoreError, _PACK_AGAIN)
    described = {"codec": STORED, "orders": {}, "dense": NO_DENSE.describe(), **parsed}
    orders = described["orders"]
    has_orders = isinstance(orders, dict) and all(isinstance(order, str) for order in orders.values())
    for name, is_right in (("codec", isinstance(described["codec"], str)), ("orders", has_orders)):
        if not is_right:
            raise StoreError(f"{path} has a damaged header ({name} is {described[name]!r:.40}). {_PACK_AGAIN}")
    return described


def _dense_of(path: Path, described: Any) -> DenseRecords:
    """The dense weights that a header describes, checked: its shapes decide where bytes are read."""
    found = described if isinstance(described, dict) else {}
    kind, matrices = found.get("type"), found.get("matrices")
    if not matrices and found == NO_DENSE.describe():
        return NO_DENSE
    shapes = {}
    for one in matrices if isinstance(matrices, list) and kind in QUANTISED_TYPES else ():
        match one:
            case [str() as name, int() as rows, int() as columns] if min(rows, columns) > 0:
                shapes[name] = (rows, columns)
    dense = DenseRecords(str(kind), shapes)
    if (
        not shapes
        or dense.describe() != found
        or any(cols % EXPERT_BLOCKS[dense.kind][0] for _, cols in shapes.values())
    ):
        raise StoreError(f"{path} has a damaged header (dense is {described!r:.40}). {_PACK_AGAIN}")
    return dense


def _check_codec(path: Path, codec: str) -> None:
    """Raises StoreError for experts in an unsupported codec, such as one of an earlier version."""
    if codec not in CODECS:
        raise StoreError(
            f"{path} holds experts in the codec {codec:.40}, which this version does not read. {_quantise_again(codec)}"
        )


def _quantise_again(codec: str) -> str:
    """What to do about a store in a codec of an earlier version, or an unknown one."""
    names = EARLIER.get(codec, ("q8_0", "q4_k", "q4_1"))
    return f"Pack again with `foreroute pack --quant {names[0]}`" + (
        f" (or {' or '.join(names[1:])})." if names[1:] else "."
    )


def _check_same_model(path: Path, stored: bytes, expected: bytes) -> None:
    if stored == expected:
        return
    theirs, ours = _described(path, stored), json.loads(expected)
    if theirs.get("version") != ours["version"]:
        reason = f"it has version {theirs.get('version')}, this foreroute reads {ours['version']}"
    elif theirs.get("fingerprint") != ours["fingerprint"]:
        reason = "it was packed from other weights"
    else:
        reason = "its experts are laid out differently"
    raise StoreError(
        f"{path} does not belong to this model: {reason}. Run `foreroute pack` again, or load with packed=no."
    )
