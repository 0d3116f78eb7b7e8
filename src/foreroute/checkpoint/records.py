"""The packed store: one file, one page-aligned record per expert, each with a checksum.

    magic (8 bytes) | header bytes (u64) | header checksum (u64) | header (JSON) | 0..
    page-aligned: checksum table, one xxh3-64 per record (u64; 0 = not written yet)
    page-aligned: records, `record_stride` bytes each, in key order, laid out like a slot, so that a read needs no copy

A file with the final name is complete: it is written under another one (store_writer.py).
"""

import dataclasses
import itertools
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from foreroute.checkpoint.codecs import CODECS, EARLIER, STORED, describe, encoded_table, interleaved, orders_of, retype
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.quantised_layout import in_blocks
from foreroute.checkpoint.source_files import FileStamp
from foreroute.errors import StoreError
from foreroute.types import BLOCK_BYTES, Copy, ExpertReads, Read, round_up
from foreroute.whole_files import parse_object, refuse_pointer

STORE_NAME = "experts.foreroute"
_PARTIAL_SUFFIX = ".partial"
MAGIC = b"FOREROUT"
PREAMBLE = struct.Struct("<8sQQ")
_VERSION = 1
_PACK_AGAIN = "Remove it and run `foreroute pack` again."
_MOST_HEADER_BYTES = 64 * 2**20


def store_header(table: ExpertTable, codec: str) -> bytes:
    """The header, JSON, of a store of `table`'s experts in `codec`; equal where two stores hold the same."""
    described = {
        "version": _VERSION,
        "codec": codec,
        "fingerprint": table.index.fingerprint(),
        "record_stride": table.slot_bytes,
        "layers": [describe(layer) for layer in table.layers],
    }
    if orders := orders_of(table):
        described["orders"] = orders
    return json.dumps(described, sort_keys=True).encode()


@dataclasses.dataclass(frozen=True)
class StoreGeometry:
    """Offsets in a store whose header has `header_nbytes` bytes."""

    table_start: int
    data_start: int
    stride: int

    @classmethod
    def of(cls, header_nbytes: int, table: ExpertTable) -> "StoreGeometry":
        """Those of a store of `table`'s experts."""
        table_start = round_up(PREAMBLE.size + header_nbytes)
        data_start = round_up(table_start + 8 * table.total_slots)
        return cls(table_start, data_start, table.slot_bytes)

    def offset(self, record: int) -> int:
        """Where record `record` begins."""
        return self.data_start + record * self.stride


class PackedStore:
    """A complete store of the current model's experts; its reads replace those of the checkpoint.

    Args:
        path: the store's file. table: the model's experts as the checkpoint stores them; the store must match it.
    Attributes:
        codec: a name of codecs.py. table: the experts as the store holds them.
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
                raw_table = file.read(8 * self.table.total_slots)
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}.") from error
        expected_nbytes = self._geometry.offset(table.total_slots)
        if stamp.nbytes != expected_nbytes or len(raw_table) != 8 * table.total_slots:
            raise StoreError(
                f"{path} has {stamp.nbytes} bytes in place of {expected_nbytes}: half written or truncated. "
                + _PACK_AGAIN
            )
        self._checksums = struct.unpack(f"<{table.total_slots}Q", raw_table)
        unwritten = self._checksums.count(0)
        if unwritten:
            raise StoreError(
                f"{path} is half written: {unwritten} of {table.total_slots} records are missing. {_PACK_AGAIN}"
            )

    def _take_header(self, stored: bytes, table: ExpertTable) -> None:
        described = _described(self.path, stored)
        self.codec: str = described["codec"]
        _check_codec(self.path, self.codec)
        orders = described["orders"]
        if self.codec == STORED:  # `pack` lays MXFP4 out in blocks; earlier versions did not
            table = interleaved(retype(table, described.get("layers")), orders)
            others = (one for one in (interleaved(in_blocks(table), orders),) if store_header(one, STORED) == stored)
            table = next(others, table)
        else:
            table = interleaved(encoded_table(table, CODECS[self.codec]), orders)
        header = store_header(table, self.codec)
        _check_same_model(self.path, stored, header)
        self.table = table
        self._layers = table.layers
        self._first_record = _first_records(table)
        self._geometry = StoreGeometry.of(len(header), table)

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
            return (Read(str(self.path), self._geometry.offset(record), nbytes, (whole,), self._checksums[record]),)

        return reads


def open_store(folder: Path, asked: str, table: ExpertTable) -> PackedStore | None:
    """Open the packed store: beside the checkpoint in `folder` ("auto"), none ("no"), or at the path `asked`.

    A quantised store changes the output, so that it is used only if `asked` is its codec ("q4_k") or its path.

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
        quant = EARLIER.get(asked, (asked,))[0]
        how = f"--quant {quant}" if quant in CODECS else f"--out {asked}"
        begun = " That continues the one that was begun." if partial_path(path).is_file() else ""
        raise StoreError(f"{path} does not exist. Make it with `foreroute pack {folder} {how}`.{begun}")
    return PackedStore(path, table)


def _path_of(folder: Path, asked: str) -> Path:
    """The file that `asked` means: a codec's beside the checkpoint, or the one at a path."""
    if asked in EARLIER:
        # By the names of earlier versions: what `pack` makes of them now, before a store that is not read any more.
        found = [folder / store_name(name) for name in EARLIER[asked]]
        old = folder / store_name(asked)
        return next((path for path in (*found, old) if path.is_file()), found[0])
    if asked in CODECS:
        return folder / store_name(asked)
    path = folder / STORE_NAME if asked == "auto" else Path(asked)
    return path / STORE_NAME if path.is_dir() else path


def store_name(codec: str) -> str:
    """Name of a store's file beside the checkpoint."""
    stem, suffix = STORE_NAME.split(".")
    return STORE_NAME if codec == STORED else f"{stem}.{codec}.{suffix}"


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
    described = {"codec": STORED, "orders": {}, **parsed}
    orders = described["orders"]
    has_orders = isinstance(orders, dict) and all(isinstance(order, str) for order in orders.values())
    for name, is_right in (("codec", isinstance(described["codec"], str)), ("orders", has_orders)):
        if not is_right:
            raise StoreError(f"{path} has a damaged header ({name} is {described[name]!r:.40}). {_PACK_AGAIN}")
    return described


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
