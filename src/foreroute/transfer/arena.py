"""Experts in host memory: records side by side in one mapping, pinned where a GPU reads them.

Pinned by registering the mapping, not by a pinned allocation, which rounds up to a power of two. A record is as long as
a slot and page-aligned, so that the disk reads straight into it and moving it to a slot is one copy.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from foreroute.errors import DeviceError
from foreroute.transfer.base import Transfer
from foreroute.transfer.memory import allocate_slots
from foreroute.types import Progress
from foreroute.units import format_memory

if TYPE_CHECKING:
    import torch

# cudaHostRegisterPortable | cudaHostRegisterMapped: valid in every context, and readable by kernels.
_REGISTER_FLAGS = 0x1 | 0x2
# Reads queued at once while the arena is loaded: enough that no reader waits for this thread.
_READS_AHEAD = 64


class Arena:
    """Allocate `num_records` records of `record_bytes` each, zero until they are loaded.

    Args:
        record_bytes: a multiple of 4096.
        is_pinned: register the memory with CUDA.

    Attributes:
        records: each record's bytes, writable, 4096-byte aligned.
        tensor: all of them, uint8 [num_records, record_bytes]; the same memory.

    Raises:
        DeviceError: the memory cannot be allocated or pinned.
    """

    def __init__(self, num_records: int, record_bytes: int, *, is_pinned: bool = False) -> None:
        import torch

        self.num_records = num_records
        self.record_bytes = record_bytes
        self.nbytes = num_records * record_bytes
        try:
            memory, records = allocate_slots(num_records, record_bytes)
        except (OSError, OverflowError) as error:
            raise DeviceError(_too_large(self.nbytes, "had", str(error))) from error
        self._memory: mmap.mmap | None = memory
        self.records = records
        flat = torch.frombuffer(memory, dtype=torch.uint8, count=self.nbytes)
        self.tensor: torch.Tensor = flat.view(num_records, record_bytes)
        self.is_pinned = False
        if is_pinned:
            self._pin()

    @property
    def address(self) -> int:
        """Address of the first record; for pinned memory, a kernel's too."""
        return self.tensor.data_ptr()

    def close(self) -> None:
        """Free the memory. Nothing may be reading it. A second call does nothing."""
        if self._memory is None:
            return
        if self.is_pinned:
            import torch

            torch.cuda.cudart().cudaHostUnregister(self.address)
            self.is_pinned = False
        import torch

        self.tensor = torch.empty(0, 0, dtype=torch.uint8)
        self.records.clear()
        self._memory = None

    def _pin(self) -> None:
        import torch

        code = int(torch.cuda.cudart().cudaHostRegister(self.address, self.nbytes, _REGISTER_FLAGS))
        if code != 0:
            self.tensor = torch.empty(0, 0, dtype=torch.uint8)
            self.records.clear()
            raise DeviceError(_too_large(self.nbytes, "pinned", f"cudaHostRegister: error {code}"))
        self.is_pinned = True


def _too_large(nbytes: int, verb: str, why: str) -> str:
    return (
        f"{format_memory(nbytes)} of host memory for experts cannot be {verb} ({why}). Lower --host-memory: what is "
        "beyond it stays on disk. In a container, raise its limits of memory and of locked memory "
        "(ulimit -l; docker run --ulimit memlock=-1)."
    )


def load_records(disk: Transfer, keys: Iterable[int], progress: Progress = lambda done, total: None) -> None:
    """Read the experts `keys` in parallel, each into the record of its index in `keys`.

    Args:
        disk: reads into records; its errors are raised here, after running reads end. progress: (done, of all).
    Raises:
        ReadError, ChecksumError: an expert could not be read.
    """
    waiting = list(enumerate(keys))[::-1]
    total, done = len(waiting), 0
    try:
        while waiting or disk.num_in_flight:
            while waiting and disk.num_in_flight < _READS_AHEAD:
                record, key = waiting.pop()
                disk.defer(key, record)
            for completion in disk.wait():
                if completion.error is not None:
                    raise completion.error
                done += 1
            progress(done, total)
    finally:
        disk.reset()
