"""Huge pages for memory that is about to be filled, also where the system's free memory is in pieces.

Beside a page cache that fills the RAM, a page fault finds no free 2 MiB side by side and takes small pages, for good:
40 % of a pool in a run with Qwen3-30B-A3B's file, whose products were 3 to 20 % slower for it (docs/LOG.md). Linux 6.1
and newer make room when asked (MADV_COLLAPSE), in some 0.3 ms a page, paid once: before the first read into it.
"""

import ctypes
import mmap
import threading

import numpy as np

HUGE_PAGE_BYTES = 2 * 2**20
_MADV_COLLAPSE = 25
# After this many refusals no more is asked: an older system, or one without memory to move pages to.
_PATIENCE = 8


class HugePages:
    """Give parts of `memory`, mapped private and advised to be on huge pages, their pages before they are written.

    It does not keep the memory: `prepare` is for as long as the mapping is there.

    Attributes:
        num_refused: pages of 2 MiB that the system left in small ones.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        address = int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
        # Where the first whole page of the mapping begins; what is before and behind the whole ones stays as it comes.
        self._first = -address % HUGE_PAGE_BYTES
        self._address = address
        self._ready = bytearray(max(0, len(memory) - self._first) // HUGE_PAGE_BYTES)
        self._lock = threading.Lock()
        self.num_refused = 0
        self._madvise = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None

    def prepare(self, start: int, num_bytes: int) -> None:
        """Make the pages under bytes [start, start + num_bytes) huge. Nothing may have been written to pages of it
        that no `prepare` has covered, as each begins with a zero."""
        first = max(0, (start - self._first) // HUGE_PAGE_BYTES)
        last = min(len(self._ready), -(-(start + num_bytes - self._first) // HUGE_PAGE_BYTES))
        if self._madvise is None or self._ready.find(0, first, last) < 0:
            return
        with self._lock:
            for page in range(first, last):
                if not self._ready[page]:
                    self._make_huge(self._address + self._first + page * HUGE_PAGE_BYTES)
                    self._ready[page] = 1

    def _make_huge(self, address: int) -> None:
        assert self._madvise is not None, "checked by `prepare`"
        ctypes.memset(address, 0, 1)  # a page fault: huge at once where 2 MiB are free side by side
        if self.num_refused < _PATIENCE:
            # Through ctypes, which releases the interpreter lock. Nothing is moved where the page is huge already.
            code = self._madvise(ctypes.c_void_p(address), ctypes.c_size_t(HUGE_PAGE_BYTES), _MADV_COLLAPSE)
            self.num_refused += code != 0
