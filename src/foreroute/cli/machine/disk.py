"""How fast is the disk that models lie on, read as experts are read; and how much of it is free?"""

import errno
import mmap
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foreroute.cli.machine.findings import OK, PROBLEM, WARNING, Finding
from foreroute.system.reading import FILES, READ_FLAGS, direct_way, open_direct
from foreroute.types import round_down
from foreroute.units import format_memory, format_speed

# The reads of an expert have about this size.
_BLOCK_BYTES = 4 * 2**20
_LIMIT_S = 2.0
_MOST_BYTES = 2 * 2**30
# Below it the figure is that of a few reads.
_LEAST_BYTES = 16 * 2**20
_SLOW_BYTES_PER_S = 500e6
_LITTLE_FREE_BYTES = 20 * 2**30
# Of the finding, as documents of this system have it.
_NAME = direct_way() or "direct reads"


@dataclass(frozen=True)
class DiskSpeed:
    """What was read of a file: `nbytes` in `elapsed_s`, past the page cache if `is_direct`."""

    path: Path
    nbytes: int
    elapsed_s: float
    is_direct: bool


def measure(path: Path, *, limit_s: float = _LIMIT_S, block_bytes: int = _BLOCK_BYTES) -> DiskSpeed:
    """Read whole blocks of a file in random order, each once, for `limit_s` at most.

    Raises:
        OSError: it cannot be read.
    """
    fd, is_direct = _open(path)
    try:
        blocks = list(range(round_down(os.fstat(fd).st_size) // block_bytes))
        random.Random(0).shuffle(blocks)
        nbytes, began_s = 0, time.perf_counter()
        # A mapping begins at a page, as direct reads want it.
        with mmap.mmap(-1, block_bytes) as mapped, memoryview(mapped) as buffer:
            for block in blocks[: _MOST_BYTES // block_bytes]:
                nbytes += FILES.preadv(fd, [buffer], block * block_bytes)
                if time.perf_counter() - began_s >= limit_s:
                    break
        return DiskSpeed(path, nbytes, time.perf_counter() - began_s, is_direct)
    finally:
        os.close(fd)


def _open(path: Path) -> tuple[int, bool]:
    """The open file, and whether its reads pass the page cache by."""
    try:
        return open_direct(path), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, READ_FLAGS), False


def disk_findings(candidates: Sequence[Path]) -> list[Finding]:
    """The speed of the disk that holds the largest of `candidates` (existing weight files), and direct reads on it."""
    path = max(candidates, key=lambda one: one.stat().st_size, default=None)
    if path is None:
        return [Finding("disk", WARNING, "there is no model to read", "Name one: foreroute doctor MODEL.")]
    try:
        speed = measure(path)
    except OSError as error:
        advice = "Look at its permissions, and at the disk."
        return [Finding("disk", PROBLEM, f"{path} cannot be read: {error.strerror}", advice)]
    return [_speed_finding(speed), _direct_finding(speed)]


def _speed_finding(speed: DiskSpeed) -> Finding:
    where = f"{format_memory(speed.nbytes)} of {speed.path}"
    if speed.nbytes < _LEAST_BYTES:
        return Finding(
            "disk", WARNING, f"not measured: {where} are too little",
            "Name a model of some hundred MiB: foreroute doctor MODEL.",
        )  # fmt: skip
    rate = speed.nbytes / speed.elapsed_s
    found = f"{format_speed(rate)}, {where}"
    if not speed.is_direct:
        return Finding("disk", WARNING, f"{found}; perhaps RAM's speed, not the disk's", f"See {_NAME} below.")
    if rate >= _SLOW_BYTES_PER_S:
        return Finding("disk", OK, found)
    return Finding(
        "disk", WARNING, found,
        "Misses wait for this disk. Put the model on an NVMe SSD, or give --memory as much as fits.",
    )  # fmt: skip


def _direct_finding(speed: DiskSpeed) -> Finding:
    if speed.is_direct:
        return Finding(_NAME, OK, f"works on {speed.path.parent}")
    where = f"{speed.path.parent} does not allow it" if direct_way() else "this system has none"
    advice = "Experts go through the page cache, which takes RAM from them."
    if direct_way() == "O_DIRECT":
        advice += " Use ext4 or xfs on a disk of this machine."
    return Finding(_NAME, WARNING, where, advice)


def free_finding(cache: Path) -> Finding:
    """The room for downloads in the hub's cache."""
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    found = f"{format_memory(free)} for downloads in {cache}"
    if free >= _LITTLE_FREE_BYTES:
        return Finding("free disk", OK, found)
    advice = "Most models need more. `foreroute rm` removes those that you do not need; HF_HOME names another disk."
    return Finding("free disk", WARNING, found, advice)
