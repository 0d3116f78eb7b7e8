"""Write a packed store: read every expert once, a few at a time, and write it in its slot's layout."""

from pathlib import Path
from typing import Any

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.records import StoreWriter
from foreroute.errors import ChangedFileError
from foreroute.prepare.quantise import Quantiser
from foreroute.transfer.disk import DiskTransfer
from foreroute.transfer.memory import allocate_slots
from foreroute.types import Progress
from foreroute.writing import Claim

# Experts in memory at once: one is written while the next ones are read.
_RING_SLOTS = 4


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
    kind: dict[str, Any] = {}
    if quantiser is not None:
        kind = {"codec": quantiser.codec.name, "order": quantiser.order}
    stored = table if quantiser is None else quantiser.table
    with StoreWriter(path, stored, resume=resume, claim=claim, **kind) as writer:
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
    memory, slots = allocate_slots(_RING_SLOTS, table.slot_bytes)
    transfer = DiskTransfer(table.reads, slots.__getitem__, label=table.label, stamps=table.index.files)
    try:
        _copy_all(table, keys, writer, transfer, slots, progress, quantiser)
        transfer.close()
        writer.finish()
    finally:
        transfer.close()
        slots.clear()
        del memory


def _copy_all(
    table: ExpertTable,
    keys: list[int],
    writer: StoreWriter,
    transfer: DiskTransfer,
    slots: list[memoryview],
    progress: Progress,
    quantiser: Quantiser | None,
) -> None:
    done = requested = writer.next_record
    progress(done, len(keys))
    arrived: dict[int, int] = {}
    free = list(range(len(slots)))
    while done < len(keys):
        while free and requested < len(keys):
            transfer.demand(keys[requested], free.pop())
            requested += 1
        while keys[done] not in arrived:
            for completion in transfer.wait():
                if completion.error is not None:
                    raise completion.error
                arrived[completion.key] = completion.slot
        slot = arrived.pop(keys[done])
        layer, _ = table.expert_id(keys[done])
        if quantiser is None:
            writer.write(done, slots[slot], table.layers[layer].layout.record_bytes)
        else:
            payload = quantiser.encode(layer, slots[slot])
            writer.write(done, payload, quantiser.table.layers[layer].layout.record_bytes)
        free.append(slot)
        done += 1
        progress(done, len(keys))
