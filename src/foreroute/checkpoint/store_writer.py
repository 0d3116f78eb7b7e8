"""Write a packed store record by record under another name: synced and renamed when complete, resumed where it stopped.

What is written is described in records.py, which reads it.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import xxhash

from foreroute.checkpoint.codecs import STORED
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.records import (
    MAGIC,
    NO_DENSE,
    PREAMBLE,
    DenseRecords,
    StoreGeometry,
    partial_path,
    read_store_header,
    store_header,
)
from foreroute.checkpoint.source_files import FileStamp
from foreroute.errors import StoreError
from foreroute.system.reading import FILES
from foreroute.system.writing import reserve, sync_bytes
from foreroute.units import format_memory
from foreroute.whole_files import Claim, ClaimedError

# The checksum table is written in steps, after the records that it covers were synced.
_SYNC_EVERY_BYTES = 256 * 2**20


def claim_store(path: Path) -> Claim:
    """Claim the right to write the store `path`, by locking its partial file.

    Raises:
        StoreError: another process is writing it, or the folder is not writable.
    """
    partial = partial_path(path)
    try:
        return Claim(partial)
    except ClaimedError as error:
        who = "" if error.process_id is None else f" (process {error.process_id})"
        raise StoreError(
            f"{partial} is being written by another `foreroute pack`. Wait for it{who}, or give another --out."
        ) from None
    except OSError as error:
        raise StoreError(f"{partial} cannot be written: {error.strerror}. Choose another --out.") from error


class StoreWriter:
    """Writes a store record by record under a partial name; `finish` renames it.

    A partial file of the same model, if newer than it, is continued: `next_record` is the first missing record.

    Args:
        path: the final name. table: the experts to store, in their order. dense: the dense weights, behind them.
        codec: see PackedStore. resume: False starts anew. claim: of `claim_store`, if the caller has one; given
            up at the end.
    Raises:
        StoreError: the disk has no room (checked and reserved first), it cannot be written, or another process is
            writing it.
    """

    def __init__(
        self,
        path: Path,
        table: ExpertTable,
        *,
        codec: str = STORED,
        dense: DenseRecords = NO_DENSE,
        resume: bool = True,
        claim: Claim | None = None,
    ) -> None:
        self.path = path
        self.partial_path = partial_path(path)
        self._header = store_header(table, codec, dense)
        self._sources_changed_ns = max((stamp.mtime_ns for stamp in table.index.files.values()), default=0)
        self._geometry = StoreGeometry.of(len(self._header), table, dense)
        self._num_records = self._geometry.num_records
        self._checksums = [0] * self._num_records
        self._unsynced_bytes = 0
        self.next_record = 0
        self.nbytes = self._geometry.nbytes
        self._claim = claim or claim_store(path)
        try:
            if not (resume and self._load_partial()):
                self._guarded(self._begin)
        except BaseException:
            self._claim.close()
            raise

    def write(self, record: int, payload: memoryview, nbytes: int) -> None:
        """Write `payload` as record `record`: a slot (a stride or more) or a dense matrix; `nbytes` are checksummed."""
        offset, end = self._geometry.offsets[record : record + 2]
        payload = payload[: end - offset]
        assert len(payload) >= nbytes
        checksum = xxhash.xxh3_64_intdigest(payload[:nbytes]) or 1
        self._guarded(lambda: _write_all(self._claim.fd, payload, offset))
        self._checksums[record] = checksum
        self._unsynced_bytes += len(payload)
        if self._unsynced_bytes >= _SYNC_EVERY_BYTES:
            self._guarded(self._sync)

    def finish(self) -> None:
        """Sync everything and rename the file to its final name."""
        assert 0 not in self._checksums, "every record is written before the store is finished"
        self._guarded(self._sync)
        self._guarded(lambda: self._claim.rename(self.path))

    def discard(self) -> None:
        """Remove the partial file."""
        self._claim.discard()

    def close(self) -> None:
        """Close the partial file and keep it, with finished records noted in its table."""
        if self._claim.fd >= 0:
            self._guarded(self._sync)
            self._claim.close()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _begin(self) -> None:
        os.ftruncate(self._claim.fd, 0)
        try:
            # Reserve all space at once: a disk that is too full fails now, not after an hour.
            reserve(self._claim.fd, self.nbytes, self.path.parent)
        except KeyboardInterrupt:
            self._claim.discard()
            raise
        preamble = PREAMBLE.pack(MAGIC, len(self._header), xxhash.xxh3_64_intdigest(self._header))
        _write_all(self._claim.fd, memoryview(preamble + self._header), 0)

    def _sync(self) -> None:
        sync_bytes(self._claim.fd)
        table = struct.pack(f"<{self._num_records}Q", *self._checksums)
        _write_all(self._claim.fd, memoryview(table), self._geometry.table_start)
        self._unsynced_bytes = 0

    def _load_partial(self) -> bool:
        try:
            with open(self.partial_path, "rb") as file:
                is_newer = FileStamp.of(file.fileno()).mtime_ns >= self._sources_changed_ns
                stored = read_store_header(self.partial_path, file.read(PREAMBLE.size), file.read)
                file.seek(self._geometry.table_start)
                raw = file.read(8 * self._num_records)
        except (FileNotFoundError, StoreError):
            return False
        if not is_newer or stored != self._header or len(raw) != 8 * self._num_records:
            return False
        self._checksums = list(struct.unpack(f"<{self._num_records}Q", raw))
        self.next_record = next((i for i, value in enumerate(self._checksums) if value == 0), self._num_records)
        return True

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            self._claim.discard()
            needed = format_memory(self.nbytes, round_up=True)
            raise StoreError(
                f"{self.path} cannot be written: {error.strerror}. It needs {needed}; "
                "nothing was left behind. Make room or choose another --out."
            ) from error


def _write_all(fd: int, payload: memoryview, offset: int) -> None:
    while payload:
        written = FILES.pwrite(fd, payload, offset)
        payload, offset = payload[written:], offset + written
