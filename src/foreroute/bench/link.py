"""Measure how fast pinned host memory reaches the GPU: the ceiling of its link."""

import statistics
from collections.abc import Callable

import torch

from foreroute.bench.bandwidth import Bandwidth

_COPIED_BYTES = 2**30
_REPEATS = 5


def measure_link(record_bytes: int) -> Bandwidth:
    """Copy a gigabyte in records of `record_bytes` from pinned memory to the GPU; the median of a few rounds."""
    num_records = max(1, _COPIED_BYTES // record_bytes)
    host = torch.empty(num_records, record_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device="cuda", pin_memory=False)

    def copy() -> None:
        for record, slot in zip(host, there, strict=True):
            slot.copy_(record, non_blocking=True)

    seconds = median_seconds(copy)
    copied = num_records * record_bytes
    return Bandwidth(
        bytes_per_s=copied / seconds,
        expert_ms=seconds / num_records * 1e3,
        num_experts=num_records * _REPEATS,
        num_reads=num_records * _REPEATS,
        elapsed_s=seconds * _REPEATS,
        is_direct=True,
    )


def median_seconds(work: Callable[[], object]) -> float:
    """Median seconds that `work` takes on the GPU, over a few rounds."""
    seconds = []
    for at in range(_REPEATS + 1):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        work()
        ended.record()
        ended.synchronize()
        if at:  # the first round warms up
            seconds.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(seconds)
