"""Write a packed store: read every expert once, a few at a time, and write it in its slot's layout."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foreroute.checkpoint.codecs import STORED, interleaved
from foreroute.checkpoint.layouts import ExpertTable, Part
from foreroute.checkpoint.records import NO_DENSE
from foreroute.checkpoint.store_writer import StoreWriter
from foreroute.errors import ChangedFileError
from foreroute.kernels.ggml.interleaved import interleaver
from foreroute.prepare.quantise import DenseQuantiser, Int4Blocks, Quantiser
from foreroute.transfer.disk import DiskTransfer, own_reader
from foreroute.types import Progress
from foreroute.whole_files import Claim

# Experts in memory at once, beside those that are quantised: one is written while the next ones are read.
_RING_SLOTS = 4
# (expert key, its bytes as stored) -> its record, in the making.
Encode = Callable[[int, memoryview], "Future[memoryview]"]
_NO_ORDERS: Mapping[str, str] = {}


def pack(
    table: ExpertTable,
    path: Path,
    *,
    progress: Progress,
    resume: bool = True,
    keep_partial: bool = False,
    quantiser: Quantiser | Int4Blocks | None = None,
    orders: Mapping[str, str] = _NO_ORDERS,
    dense: DenseQuantiser | None = None,
    claim: Claim | None = None,
) -> int:
    """Write the experts of `table` to a store at `path`, as `quantiser` has them if given; return its size in bytes.

    Behind them go the dense weights, if `dense` is given, which quantises them.

    A partial file left by a crash is continued if `resume`; an interrupt removes it unless `keep_partial`.

    Args:
        orders: by type of blocks, this machine's order of eight rows side by side, for matrices that are to have it.
        progress: called with (records done, all): experts, then dense matrices.
        claim: of `claim_store`, if the caller has one; released at the end.
    Raises:
        StoreError: the disk is full or cannot be written, or another process is writing this store.
        ReadError: an expert or a dense weight could not be read; named.
        CorruptCheckpointError: a dense weight is no number, or too large.
        ChangedFileError: the checkpoint was replaced or written to meanwhile; the partial file is removed.
    """
    keys = table.keys.all()
    codec = STORED if quantiser is None else quantiser.codec.name
    maker = RecordMaker(table, quantiser, orders)
    records = NO_DENSE if dense is None else dense.records
    total = len(keys) + len(records.shapes)
    with StoreWriter(path, maker.table, codec=codec, dense=records, resume=resume, claim=claim) as writer:
        try:
            progress(writer.next_record, total)
            _read_and_write(table, keys, writer, lambda done, _: progress(done, total), maker)
            for at, name in enumerate(records.shapes, start=len(keys)):
                if at >= writer.next_record:
                    assert dense is not None, "it has records"
                    blocks = dense.blocks(name)
                    writer.write(at, blocks, len(blocks))
                    progress(at + 1, total)
            writer.finish()
        except (KeyboardInterrupt, ChangedFileError) as error:
            # Keep nothing of a checkpoint that changed: continuing would mix two models.
            if isinstance(error, ChangedFileError) or not keep_partial:
                writer.discard()
            raise
    return writer.nbytes


class RecordMaker:
    """Makes records of experts as they are read: by `quantiser`, if given, then with rows side by side by `orders`.

    Attributes:
        table: the experts as the store has them. num_threads: how many make one at once; 0 where nothing changes.
    """

    def __init__(
        self, source: ExpertTable, quantiser: Quantiser | Int4Blocks | None, orders: Mapping[str, str]
    ) -> None:
        self._quantiser = quantiser
        self._before = source if quantiser is None else quantiser.table
        self.table = interleaved(self._before, orders)
        is_same = self.table is self._before
        self.num_threads = quantiser.num_threads if quantiser else 0 if is_same else torch.get_num_threads()

    def make(self, key: int, slot: memoryview) -> memoryview:
        """The record of expert `key`, whose bytes as they are read are in `slot`."""
        record = slot if self._quantiser is None else self._quantiser.encode(key, slot)
        if self.table is self._before:
            return record
        layer, _ = self.table.expert_id(key)
        before, after = self._before.layers[layer], self.table.layers[layer]
        made = np.zeros(self.table.slot_bytes, dtype=np.uint8)
        for one, other in zip(before.parts, after.parts, strict=True):
            for at, old in enumerate(one.matrices):
                # One that was taken apart has become several.
                count = len(other.matrices) // len(one.matrices)
                for which, new in enumerate(other.matrices[at * count : (at + 1) * count]):
                    for old_at, new_at in zip(old.at, new.at, strict=True):
                        rows = _bytes(record, before.layout.parts[old_at])[which::count]
                        if new.coding.order:
                            rows = interleaver(new.coding.block_type, new.cols).convert(rows)
                        _bytes(made, after.layout.parts[new_at])[:] = rows
            if not one.matrices:
                _bytes(made, after.layout.parts[other.at])[:] = _bytes(record, before.layout.parts[one.at])
        return memoryview(made.data)


def _bytes(record: Any, part: Part) -> np.ndarray:
    """A part's rows in a record: uint8 [rows, bytes of a row]."""
    whole = np.frombuffer(record, dtype=np.uint8)
    return whole[part.offset : part.offset + part.nbytes].reshape(part.shape[0], -1)


def _read_and_write(
    table: ExpertTable, keys: list[int], writer: StoreWriter, progress: Progress, maker: RecordMaker
) -> None:
    options = {"label": table.label, "stamps": table.index.files}
    num_slots = _RING_SLOTS + maker.num_threads
    with own_reader(table.reads, num_slots, table.slot_bytes, **options) as reader, _encoder(maker) as encode:
        _copy_all(maker.table, keys, writer, *reader, progress, encode)


@contextmanager
def _encoder(maker: RecordMaker) -> Iterator[Encode]:
    """What makes a record of a slot: in threads of its own, or, where nothing changes, at once."""
    if not maker.num_threads:
        yield _unchanged
        return
    # One thread per expert, each with one of torch's.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(maker.num_threads, "foreroute-quantise")
    try:
        yield lambda key, slot: pool.submit(maker.make, key, slot)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def _unchanged(key: int, slot: memoryview) -> "Future[memoryview]":
    done: Future[memoryview] = Future()
    done.set_result(slot)
    return done


def _copy_all(
    stored: ExpertTable,
    keys: list[int],
    writer: StoreWriter,
    transfer: DiskTransfer,
    slots: list[memoryview],
    progress: Progress,
    encode: Encode,
) -> None:
    """Read, encode and write all experts; records are written in the order of keys. stored: as the store has them."""
    done = requested = writer.next_record
    encoded: dict[int, tuple[int, Future[memoryview]]] = {}
    free = list(range(len(slots)))
    while done < len(keys):
        while free and requested < len(keys):
            transfer.demand(keys[requested], free.pop())
            requested += 1
        for completion in transfer.completed() if keys[done] in encoded else transfer.wait():
            if completion.error is not None:
                raise completion.error
            encoded[completion.key] = (completion.slot, encode(completion.key, slots[completion.slot]))
        if keys[done] not in encoded:
            continue
        slot, record = encoded.pop(keys[done])
        layer, _ = stored.expert_id(keys[done])
        writer.write(done, record.result(), stored.layers[layer].layout.record_bytes)
        free.append(slot)
        done += 1
        progress(done, len(keys))
