"""Memory as the system gives it, and what it says about it where there is no /proc: by the package psutil."""

import mmap
import os
import sys
from typing import Any

from foreroute.system.modules import optional

RESOURCE = optional("resource")


def map_private(num_bytes: int) -> mmap.mmap:
    """Map anonymous memory of this process alone: page-aligned, zero."""
    if hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS"):
        native: Any = mmap
        mapped: mmap.mmap = native.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | native.MAP_ANONYMOUS)
        return mapped
    return mmap.mmap(-1, num_bytes)


def advise_huge(memory: mmap.mmap) -> None:
    """Ask for huge pages under a mapping, where they can be asked for (Linux)."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        advised: Any = memory
        advised.madvise(mmap.MADV_HUGEPAGE)


def give_back_freed() -> None:
    """Return what the allocator keeps of freed memory to the system, where it can be asked (glibc)."""
    if os.name != "posix":
        return
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def machine_memory() -> tuple[int, int] | None:
    """(all, available) bytes of RAM by psutil; None where it is not installed or does not know."""
    psutil: Any = optional("psutil")
    if psutil is None:
        return None
    try:
        found = psutil.virtual_memory()
    except (OSError, RuntimeError, KeyError):
        return None
    return int(found.total), int(found.available)


def peak_resident_bytes() -> int:
    """The most RAM that this process has had so far; 0 where the system does not say."""
    if RESOURCE is not None:
        peak: int = RESOURCE.getrusage(RESOURCE.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    psutil: Any = optional("psutil")
    if psutil is None:
        return 0
    found = psutil.Process().memory_info()
    # Of Windows; elsewhere the bytes of now.
    return int(getattr(found, "peak_wset", found.rss))
