"""Where slots lie and what is behind them: RAM with the disk behind, or a device with an arena in host memory."""

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.records import PackedStore
from foreroute.config import EngineConfig
from foreroute.trace import Trace
from foreroute.transfer.arena import Arena, load_records
from foreroute.transfer.base import Transfer
from foreroute.transfer.copier import CudaCopier, MemoryCopier
from foreroute.transfer.cuda import out_of_memory_named
from foreroute.transfer.disk import DiskTransfer
from foreroute.transfer.logical import LogicalTransfer
from foreroute.transfer.memory import allocate_slots
from foreroute.transfer.tiered import TieredTransfer
from foreroute.transfer.traced import TracedTransfer
from foreroute.types import Progress

# Readers while an arena is loaded: nothing computes meanwhile, so that checks and copies may take more cores.
_LOADING_THREADS = 4
LESS_MEMORY = "Lower --memory, --kv-tokens or --prefill-chunk, or close other programs that use the GPU."


@dataclass(frozen=True)
class SlotMemory:
    """The pool of slots: its memory, what fills it, and how to let go of it after the transfer has been closed."""

    memory: mmap.mmap | torch.Tensor
    transfer: Transfer
    free: Callable[[], None]


def place(
    asked: EngineConfig, table: ExpertTable, store: PackedStore | None, num_slots: int, trace: Trace | None
) -> SlotMemory:
    """Slots in RAM, filled from disk."""
    memory, slots = allocate_slots(num_slots, table.slot_bytes)
    disk = open_disk(asked, table, store, slots.__getitem__, asked.readers(table.slot_bytes))
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
    """Slots on `device`, filled from `num_records` records in host memory, and those from disk where they are fewer
    than the experts.

    Raises:
        DeviceError: memory cannot be had, or not be pinned. ReadError, ChecksumError: an expert could not be read.
    """
    with out_of_memory_named(f"{num_slots} experts' slots", LESS_MEMORY):
        slots = torch.empty(num_slots, table.slot_bytes, dtype=torch.uint8, device=device)
    arena, keys = fill_arena(asked, table, store, num_records, is_pinned=device.type == "cuda", progress=progress)
    # A pool of some experts starts empty: what a prompt uses is a better choice than any made here.
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
    """Host memory for so many experts, and the keys of its records: all experts where they fit, else none yet."""
    arena = Arena(num_records, table.slot_bytes, is_pinned=is_pinned)
    keys = all_keys(table)
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


def all_keys(table: ExpertTable) -> list[int]:
    """The keys of all experts that there are, ascending."""
    return table.keys.all()


def open_disk(
    asked: EngineConfig,
    table: ExpertTable,
    store: PackedStore | None,
    slot_memory: Callable[[int], memoryview],
    num_threads: int,
) -> DiskTransfer:
    """Readers of the checkpoint, or of its packed store.

    Raises:
        ReadError: a file is not what it was when its header was read, or cannot be opened.
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
        transfer = LogicalTransfer(transfer)
    if trace is not None:
        transfer = TracedTransfer(transfer, trace, table.expert_id, time.perf_counter)
    return transfer
