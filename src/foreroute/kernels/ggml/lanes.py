"""Lanes: threads that compute alone, each with torch on one thread and a runner of its own.

The work of many rows is dealt in large pieces, an expert or a share of a matrix's rows, so that cores meet once per
piece instead of several times per product. An expert's products alternate between ggml's threads, torch's and those
that convert; each pool waits by spinning or has to be woken while another one has the cores. In a prompt of 512 tokens
that cost more than the products (docs/LOG.md). Lanes wait without polling: they take no core from what is computed
beside them.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import ParamSpec, TypeVar

import torch

from foreroute.kernels.ggml.graph import Runner
from foreroute.kernels.ggml.library import Library, open_library

T = TypeVar("T")
P = ParamSpec("P")


class Lanes:
    """`count` lanes, started by the first piece of work.

    Args:
        library: see library.py.
    """

    def __init__(self, library: Library, count: int) -> None:
        self.library, self.count = library, count
        self._own, self._lock = threading.local(), threading.Lock()
        self._workers: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Call `work` on a lane, without gradients. What it reads must stay as it is until the future is done."""
        with self._lock:
            if self._workers is None:
                self._workers = self._started()
        is_inference = torch.is_inference_mode_enabled()

        def run() -> T:
            # What the caller makes in inference mode may be changed in inference mode only.
            with torch.inference_mode(is_inference), torch.no_grad():
                return work(*args, **kwargs)

        return self._workers.submit(run)

    @property
    def runner(self) -> Runner:
        """The runner, of one thread, of the lane that asks."""
        if not hasattr(self._own, "runner"):
            self._own.runner = Runner(self.library, 1)
        runner: Runner = self._own.runner
        return runner

    def _started(self) -> ThreadPoolExecutor:
        """The threads, all of them begun: torch's number of threads is the process's until a thread has its own."""
        together = threading.Barrier(self.count + 1)
        workers = ThreadPoolExecutor(self.count, "ggml-lane", initializer=_take_one_thread)
        before = torch.get_num_threads()
        for _ in range(self.count):
            workers.submit(together.wait)
        together.wait()
        torch.set_num_threads(before)
        return workers


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the context, torch computes on the calling thread alone, as the cores are the lanes'."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _take_one_thread() -> None:
    # Asked first: a thread takes over the process's number when it asks or computes for the first time.
    torch.get_num_threads()
    torch.set_num_threads(1)


@lru_cache(maxsize=8)
def shared_lanes(count: int) -> Lanes:
    """The process's lanes, `count` of them."""
    return Lanes(open_library(), count)


if hasattr(os, "register_at_fork"):
    # A forked process has none of these threads.
    os.register_at_fork(after_in_child=shared_lanes.cache_clear)
