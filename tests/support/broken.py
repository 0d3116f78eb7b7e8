"""Ways to spoil a copy of a checkpoint, as a broken download or a full disk does, and the reads of a loaded model."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from foreroute.errors import ReadError
from foreroute.transfer.base import Completion

Header = dict[str, Any]


def copied(folder: Path, to: Path) -> Path:
    """A copy that may be spoilt."""
    shutil.copytree(folder, to)
    return to


def read_parts(file: Path) -> tuple[Header, bytes]:
    """A safetensors file's header and its tensors' bytes."""
    raw = file.read_bytes()
    (header_nbytes,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + header_nbytes]), raw[8 + header_nbytes :]


def write_parts(file: Path, header: Header, payload: bytes) -> None:
    """The opposite of `read_parts`."""
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + payload)


def change_header(file: Path, change: Callable[[Header], Any]) -> None:
    """Apply `change` to the header of a safetensors file, in place; the tensors' bytes stay."""
    header, payload = read_parts(file)
    change(header)
    write_parts(file, header, payload)


def closed_up(header: Header, payload: bytes) -> tuple[Header, bytes]:
    """The same tensors without the gaps that shrunken or removed ones left: safetensors allows none."""
    moved, pieces, end = {}, list[bytes](), 0
    names = sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    for name in names:
        begin, stop = header[name]["data_offsets"]
        pieces.append(payload[begin:stop])
        moved[name] = {**header[name], "data_offsets": [end, end + stop - begin]}
        end += stop - begin
    return moved, b"".join(pieces)


def without(file: Path, name: str) -> None:
    """Remove one tensor from a safetensors file."""
    header, payload = read_parts(file)
    del header[name]
    write_parts(file, *closed_up(header, payload))


def flip_byte(file: Path, offset: int) -> None:
    """Turn over all bits of one byte, as a failing disk does: the file's times stay. A negative offset counts from the
    end."""
    before = file.stat()
    with open(file, "r+b") as opened:
        opened.seek(offset, 0 if offset >= 0 else 2)
        at = opened.tell()
        (value,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([value ^ 0xFF]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def overwrite(file: Path, content: bytes) -> None:
    """Write over a file in place, as `rsync --inplace` or a program that keeps it open does; its times change."""
    before = file.stat().st_mtime_ns
    with open(file, "r+b") as opened:
        opened.write(content)
        opened.truncate()
    # A clock of a file system ticks every few milliseconds: a test is quicker than that.
    os.utime(file, ns=(before, before + 10_000_000))


def replace(file: Path, content: bytes) -> None:
    """Give another file its name, as a download or `mv` does."""
    other = file.with_name(file.name + ".new")
    other.write_bytes(content)
    other.replace(file)


@contextmanager
def unreadable(model: Any, is_bad: Callable[[int], bool]) -> Iterator[list[int]]:
    """Reads of experts for whose keys `is_bad` says so end in a ReadError inside; the keys that did, in order.

    On the way from the readers to the engine, whatever reads and however often it tried.
    """
    transfer, failed = model.foreroute.engine.pool.transfer, list[int]()

    def spoilt(completions: Sequence[Completion]) -> list[Completion]:
        made = []
        for one in completions:
            if one.error is None and is_bad(one.key):
                failed.append(one.key)
                one = one._replace(error=ReadError(f"Reading expert {one.key}: planted."), nbytes=0)
            made.append(one)
        return made

    with pytest.MonkeyPatch.context() as patch:
        for name in ("wait", "completed"):
            ask = getattr(transfer, name)
            patch.setattr(transfer, name, lambda ask=ask: spoilt(ask()))
        yield failed
