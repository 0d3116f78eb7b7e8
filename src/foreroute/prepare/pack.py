"""Write a packed store: read every expert once, a few at a time, and write it in its slot's layout."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from foreroute.checkpoint.codecs import STORED
from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.records import StoreWriter
from foreroute.errors import ChangedFileError
from foreroute.prepare.quantise import Quantiser
from foreroute.transfer.disk import DiskTransfer
from foreroute.transfer.memory import allocate_slots
from foreroute.types import Progress
from foreroute.writing import Claim

# Experts in memory at once, beside those that are quantised: one is written while the next ones are read.
_RING_SLOTS = 4
# (expert key, its bytes as stored) -> its record, in the making.
Encode = Callable[[int, memoryview], "Future[memoryview]"]


def pack(
    table: ExpertTable,
    path: Path,
    *,
    progress: Progress,
    resume: bool = True,
    keep_partial: bool = False,
    quantiser: Quantiser | None = None,
    claim: Claim | None = None,
) -> int:
    """Write the experts of `table` to a store at `path`, encoded by `quantiser` if given; return its size in bytes.

    A partial file left by a crash is continued if `resume`; an interrupt removes it unless `keep_partial`.

    Args:
        progress: called with (experts done, all). claim: of `claim_store`, if the caller has one; released at the end.
    Raises:
        StoreError: the disk is full or cannot be written, or another process is writing this store.
        ReadError: an expert could not be read; named.
        ChangedFileError: the checkpoint was replaced or written to meanwhile; the partial file is removed.
    """
    keys = table.keys.all()
    codec, stored = (STORED, table) if quantiser is None else (quantiser.codec.name, quantiser.table)
    with StoreWriter(path, stored, codec=codec, resume=resume, claim=claim) as writer:
        try:
            _read_and_write(table, keys, writer, progress, quantiser)
        except (KeyboardInterrupt, ChangedFileError) as error:
            # Keep nothing of a checkpoint that changed: continuing would mix two models.
            if isinstance(error, ChangedFileError) or not keep_partial:
                writer.discard()
            raise
    return writer.nbytes


def _read_and_write(
    table: ExpertTable, keys: list[int], writer: StoreWriter, progress: Progress, quantiser: Quantiser | None
) -> None:
    num_slots = _RING_SLOTS + (0 if quantiser is None else quantiser.num_threads)
    memory, slots = allocate_slots(num_slots, table.slot_bytes)
    transfer = DiskTransfer(table.reads, slots.__getitem__, label=table.label, stamps=table.index.files)
    stored = table if quantiser is None else quantiser.table
    try:
        with _encoder(quantiser) as encode:
            _copy_all(stored, keys, writer, transfer, slots, progress, encode)
        transfer.close()
        writer.finish()
    finally:
        transfer.close()
        slots.clear()
        del memory


@contextmanager
def _encoder(quantiser: Quantiser | None) -> Iterator[Encode]:
    """What makes a record of a slot: in threads of its own, or, where nothing is quantised, at once."""
    if quantiser is None:
        yield _unchanged
        return
    # One thread per expert, each with one of torch's.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(quantiser.num_threads, "foreroute-quantise")
    try:
        yield lambda key, slot: pool.submit(quantiser.encode, key, slot)
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
    progress(done, len(keys))
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
