"""Measure the memory that models take of this process, one after another, and memory bandwidth."""

import gc
import time

import torch

from foreroute.memory.freed import trim
from foreroute.memory.host import process_bytes, reset_peak

# Larger than any cache, so that memory itself is measured.
_COPY_BYTES = 256 * 2**20
_COPIES = 5


def memory_bytes_per_s() -> float:
    """Bytes per second read and written in a large copy by torch's threads; the best of several."""
    source = torch.ones(_COPY_BYTES // 4, dtype=torch.float32)
    target = torch.zeros_like(source)
    best_s = float("inf")
    for _ in range(_COPIES):
        started_s = time.perf_counter()
        target.copy_(source)
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * _COPY_BYTES / best_s


def give_back_freed_memory() -> None:
    """Collect garbage and return freed memory to the system: else the next model's memory would not show."""
    gc.collect()
    trim()


class PeakRss:
    """Peak memory of one of several models in this process, as if it ran alone here.

    Inside `with`, the process's growth counts as the model's. `peak_bytes` adds the largest growth to what the process
    had before any model (`base_bytes`). None where the system does not tell (/proc/self/clear_refs).
    """

    def __init__(self, base_bytes: int | None) -> None:
        self._base_bytes = base_bytes
        self._own_bytes = 0
        self._own_peak_bytes = 0
        self._before_bytes: int | None = None

    @property
    def peak_bytes(self) -> int | None:
        """Peak bytes so far."""
        return None if self._base_bytes is None else self._base_bytes + self._own_peak_bytes

    def __enter__(self) -> "PeakRss":
        self._before_bytes = process_bytes("VmRSS") if reset_peak() else None
        if self._before_bytes is None:
            self._base_bytes = None
        return self

    def __exit__(self, *error: object) -> None:
        peak_bytes, now_bytes = process_bytes("VmHWM"), process_bytes("VmRSS")
        if self._before_bytes is None or peak_bytes is None or now_bytes is None:
            return
        self._own_peak_bytes = max(self._own_peak_bytes, self._own_bytes + peak_bytes - self._before_bytes)
        self._own_bytes += now_bytes - self._before_bytes


def rss_bytes() -> int | None:
    """Resident bytes of this process now; None where the system does not say."""
    return process_bytes("VmRSS")
