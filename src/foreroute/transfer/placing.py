"""Allocate the slot pool and its backing tier: RAM backed by disk, or a device backed by an arena in host memory."""

import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.records import PackedStore
from foreroute.config import EngineConfig
from foreroute.trace import Trace
from foreroute.transfer.base import Transfer
from foreroute.transfer.disk import DiskTransfer
from foreroute.transfer.huge_pages import HugePages
from foreroute.transfer.memory import Arena, allocate_pool, load_records, out_of_memory_named
from foreroute.transfer.tiered import CudaCopier, MemoryCopier, TieredTransfer
from foreroute.transfer.wrappers import LogicalTransfer, TracedTransfer
from foreroute.types import Progress, SlotClass

# Reader threads while an arena is loaded: nothing computes meanwhile, so checks and copies may take more cores.
_LOADING_THREADS = 4
LESS_MEMORY = "Lower --memory, --kv-tokens or --prefill-chunk, or close other programs that use the GPU."


@dataclass(frozen=True)
class SlotMemory:
    """The pool of slots: its memory, the transfer that loads it, and what frees it after the transfer was closed."""

    memory: mmap.mmap | torch.Tensor
    transfer: Transfer
    free: Callable[[], None]


def place(
    asked: EngineConfig,
    table: ExpertTable,
    store: PackedStore | None,
    classes: Sequence[SlotClass],
    trace: Trace | None,
) -> SlotMemory:
    """Allocate slots in RAM, of one length or several, loaded from the checkpoint, or from the packed `store` if given.

    asked: the config. table: the experts as stored. trace: records the loads; None: no trace.
    """
    memory, slots = allocate_pool(classes)
    pages = HugePages(memory)
    starts = [one.offset(slot) for one in classes for slot in range(one.first, one.first + one.num_slots)]

    def slot_memory(slot: int) -> memoryview:
        pages.prepare(starts[slot], len(slots[slot]))
        return slots[slot]

    disk = open_disk(asked, table, store, slot_memory, asked.readers(table.slot_bytes))
    return SlotMemory(memory, _dressed(disk, asked, table, trace), slots.clear)


def place_behind_arena(
    asked: EngineConfig,
    table: ExpertTable,
    store: PackedStore | None,
    num_slots: int,
    trace: Trace | None,
    *,
    device: torch.device,
    num_records: int,
    progress: Progress,
) -> SlotMemory:
    """Allocate slots on `device`, loaded from an arena of `num_records` experts in host memory.

    With fewer records than experts, the arena is loaded from disk on demand; else now, with `progress`.
    asked, table, store, num_slots, trace: as of `place`.

    Raises:
        DeviceError: memory cannot be allocated or pinned. ReadError, ChecksumError: an expert could not be read.
    """
    with out_of_memory_named(f"{num_slots} experts' slots", LESS_MEMORY):
        slots = torch.empty(num_slots, table.slot_bytes, dtype=torch.uint8, device=device)
    arena, keys = fill_arena(asked, table, store, num_records, is_pinned=device.type == "cuda", progress=progress)
    # An arena for some of the experts starts empty: what a prompt uses is a better choice than any made here.
    disk = None
    if not keys:
        disk = open_disk(asked, table, store, arena.records.__getitem__, asked.readers(table.slot_bytes))
    copier = CudaCopier(arena.tensor, slots) if device.type == "cuda" else MemoryCopier(arena.tensor, slots)
    transfer = TieredTransfer(copier, keys, num_records, disk, table.key_nbytes.__getitem__)
    return SlotMemory(slots.view(-1), _dressed(transfer, asked, table, trace), arena.close)


def fill_arena(
    asked: EngineConfig,
    table: ExpertTable,
    store: PackedStore | None,
    num_records: int,
    *,
    is_pinned: bool,
    progress: Progress,
) -> tuple[Arena, list[int]]:
    """Make an arena of `num_records` experts; return it and the keys in it: all if they fit, else none yet.

    asked, table, store, progress: as of `place_behind_arena`. is_pinned: register it with CUDA.
    """
    arena = Arena(num_records, table.slot_bytes, is_pinned=is_pinned)
    keys = table.keys.all()
    if num_records < len(keys):
        return arena, []
    disk = open_disk(asked, table, store, arena.records.__getitem__, max(asked.reader_threads or 1, _LOADING_THREADS))
    try:
        load_records(disk, keys, progress)
    except BaseException:
        disk.close()
        arena.close()
        raise
    disk.close()
    return arena, keys


def open_disk(
    asked: EngineConfig,
    table: ExpertTable,
    store: PackedStore | None,
    slot_memory: Callable[[int], memoryview],
    num_threads: int,
) -> DiskTransfer:
    """Start `num_threads` readers of `table`'s checkpoint or its packed `store` into `slot_memory`, as `asked`.

    Raises:
        ReadError: a file has changed since its header was read, or cannot be opened.
    """
    return DiskTransfer(
        table.reads if store is None else store.reads_of(table),
        slot_memory,
        num_threads=num_threads,
        direct=asked.direct_io,
        label=table.label,
        stamps=table.index.files if store is None else store.files,
    )


def _dressed(transfer: Transfer, asked: EngineConfig, table: ExpertTable, trace: Trace | None) -> Transfer:
    if asked.deterministic:
        transfer = cast(Transfer, LogicalTransfer(transfer))
    if trace is not None:
        transfer = cast(Transfer, TracedTransfer(transfer, trace, table.expert_id, time.perf_counter))
    return transfer
