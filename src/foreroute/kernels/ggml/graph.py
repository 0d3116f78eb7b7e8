"""Graphs of products over memory that is ours, built once and run often, on one pool of threads.

ggml aborts the process where an operation cannot take its tensors, so that what is given here was checked before:
columns are whole blocks, and ids are slots.

All threads multiply while each has a core to itself; fewer, while other programs use the cores. ggml's threads wait for
one another by spinning, several times in every product. Where one of them has no core, the others spin until the system
gives it one, some milliseconds later: two threads on a busy machine took fifty times as long as one (docs/LOG.md). So
the time that threads wait for a core is looked at whenever a graph took too long.
"""

import ctypes as c
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from foreroute.kernels.ggml.library import GgmlError, Library, open_library
from foreroute.kernels.ggml.types import BlockType, ComputePlan, ContextParams

# A pointer to a Tensor; ctypes types such pointers by value only.
TensorRef = Any
# How long a thread polls for the next graph before it sleeps, in ggml's units of 131,072 polls, some 3 ms: longer than
# what torch does between two products, shorter than a wait for the disk.
_POLL = 1

_TASKS = Path("/proc/self/task")
# Of /proc/stat, which other systems have neither of.
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
# A run this much slower than the quickest of its graph is looked into: factor, and seconds.
_SLOW_FACTOR, _SLOW_S = 3.0, 0.002
# Of a run's time, what its threads may have waited for cores before there are fewer of them.
_MOST_WAIT = 0.25
# Seconds between looks at idle cores, and before more threads are tried again: at first, and at most.
_LOOK_S, _RETRY_S, _MOST_RETRY_S = 0.2, 0.4, 8.0


class Runner:
    """Runs graphs, one at a time, on `num_threads` threads: the caller's and ggml's own.

    Args:
        library: see library.py. poll: how long its threads poll between graphs, 0 to 100.
    Attributes:
        threads: how many are used now: fewer while other programs use the cores.
    """

    def __init__(self, library: Library, num_threads: int, poll: int = _POLL) -> None:
        self.library = library
        self.num_threads = num_threads
        self._pools = {count: self._start(count, poll) for count in _halvings(num_threads)}
        self._work = np.empty(1 << 20, dtype=np.uint8)
        self._work_address = int(self._work.ctypes.data)
        self._compute = library.ggml_graph_compute
        self._lock, self._caller = threading.Lock(), threading.get_native_id()
        self.threads = ThreadCount(num_threads, lambda: waited_s(self._waiters), idle_s, perf_counter)

    def plan(self, graph: int) -> ComputePlan:
        """How a graph is computed by all threads."""
        plan: ComputePlan = self.library.ggml_graph_plan(graph, self.num_threads, self._pools[self.num_threads][0])
        return plan

    def compute(self, graph: "Graph") -> None:
        """Compute a finished graph; its inputs must be written, and its outputs are when this returns."""
        with self._lock:
            threads = self.threads
            started = perf_counter()
            threads.before_run(started)
            if graph.planned_for != (threads.active, self._work_address):
                self._prepare(graph)
            status = self._compute(graph.address, graph.plan_ref)
            took = perf_counter() - started
            if took < graph.quickest_s:
                graph.quickest_s = took
            elif threads.is_slow(took, graph.quickest_s):
                caller = threading.get_native_id()
                if caller == self._caller:
                    threads.look(took)
                else:
                    self._caller = caller
                    threads.begin()
        if status:
            raise GgmlError(f"ggml could not compute a graph (status {status}).")

    def count_waits_anew(self) -> None:
        """From now on this thread calls, and what it waited for a core before is none of a graph's wait."""
        with self._lock:
            self._caller = threading.get_native_id()
            self.threads.begin()

    def _prepare(self, graph: "Graph") -> None:
        """Give a graph's plan the threads of now and the memory that all graphs share."""
        plan, active = graph.plan, self.threads.active
        if plan.work_size > len(self._work):
            self._work = np.empty(int(plan.work_size), dtype=np.uint8)
            self._work_address = int(self._work.ctypes.data)
        plan.work_data, plan.n_threads, plan.threadpool = self._work_address, active, self._pools[active][0]
        graph.planned_for = (active, self._work_address)

    @property
    def _waiters(self) -> list[int]:
        return [*(worker for _, workers in self._pools.values() for worker in workers), threading.get_native_id()]

    def _start(self, count: int, poll: int) -> tuple[int, list[int]]:
        """A pool of `count` threads, the caller counted, and the ids of the others."""
        params = self.library.ggml_threadpool_params_default(count)
        params.poll = poll
        before = running_threads()
        pool = self.library.ggml_threadpool_new(c.byref(params))
        if not pool:
            raise GgmlError(f"ggml could not start {count} threads.")
        weakref.finalize(self, self.library.ggml_threadpool_free, pool)
        return pool, sorted(running_threads() - before)


class Graph:
    """A graph in the making: add tensors and operations, then `finish`; afterwards `run` as often as wanted.

    Tensors have no memory of ggml's: `place` says where one lies.

    Args:
        num_tensors: the most tensors, operations included.
    Attributes:
        quickest_s: the least time of a run. address, plan, plan_ref, planned_for: for the runner.
    """

    def __init__(self, runner: Runner, num_tensors: int) -> None:
        library = self.library = runner.library
        self._runner = runner
        nbytes = num_tensors * library.ggml_tensor_overhead() + library.ggml_graph_overhead_custom(num_tensors, False)
        self.context = library.ggml_init(ContextParams(nbytes, None, True))
        if not self.context:
            raise GgmlError("ggml could not allocate a graph.")
        weakref.finalize(self, library.ggml_free, self.context)
        self._num_tensors = num_tensors
        self.quickest_s = inf
        self.address = 0
        self.plan = ComputePlan()
        self.plan_ref = c.byref(self.plan)
        self.planned_for = (0, 0)

    def tensor(self, number: int, extents: Sequence[int]) -> TensorRef:
        """A tensor of type `number` with two or three `extents`, from the innermost."""
        if len(extents) == 2:
            return self.library.ggml_new_tensor_2d(self.context, number, *extents)
        return self.library.ggml_new_tensor_3d(self.context, number, *extents)

    def matrices(
        self, kind: BlockType, shape: tuple[int, int], count: int, strides: tuple[int, int], address: int
    ) -> TensorRef:
        """`count` matrices [rows, columns] of blocks, at `address` and every `strides[1]` bytes after it.

        Args:
            strides: bytes between rows, and between matrices.
        """
        rows, columns = shape
        tensor = self.tensor(kind.number, (columns, rows, count))
        tensor.contents.nb[1], tensor.contents.nb[2] = strides
        tensor.contents.nb[3] = strides[1] * count
        tensor.contents.data = address
        return tensor

    def finish(self, *outputs: TensorRef) -> None:
        """Make the graph of all operations that `outputs` need."""
        library = self.library
        self.address = library.ggml_new_graph_custom(self.context, self._num_tensors, False)
        for output in outputs:
            library.ggml_build_forward_expand(self.address, output)
        self.plan = self._runner.plan(self.address)
        self.plan_ref = c.byref(self.plan)

    def run(self) -> None:
        """Compute the outputs from what lies in the inputs' memory now."""
        self._runner.compute(self)


def _halvings(most: int) -> list[int]:
    """`most`, its half, and so on to 1."""
    return [most >> shift for shift in range(most.bit_length())]


def place(tensor: TensorRef, address: int) -> None:
    """Say where a tensor's memory is; it must stay there as long as the graph runs."""
    tensor.contents.data = address


@lru_cache(maxsize=8)
def shared_runner(num_threads: int) -> Runner:
    """The process's runner with `num_threads`; models open together take turns on it."""
    return Runner(open_library(), num_threads)


class ThreadCount:
    """The number of threads to use now. Pure but for what it is given to look with.

    Args:
        most: threads that there are. waited_s: seconds that they have waited for a core, in all. idle_s: seconds that
            the machine's cores have been idle, in all. now_s: the clock.
    Attributes:
        active: threads to use now.
    """

    def __init__(
        self, most: int, waited_s: Callable[[], float], idle_s: Callable[[], float], now_s: Callable[[], float]
    ) -> None:
        self.active = self._most = most
        self._waited_s, self._idle_s, self._now_s = waited_s, idle_s, now_s
        self._waited_before, self._looked_at = waited_s(), now_s()
        self._retry_s = _RETRY_S
        self._retry_at, self._idle_before, self._idle_at, self._added_at = 0.0, 0.0, 0.0, -inf

    def is_slow(self, took_s: float, quickest_s: float) -> bool:
        """Whether a run should be looked into, by the quickest of the same graph."""
        return took_s > _SLOW_FACTOR * quickest_s + _SLOW_S

    def begin(self) -> None:
        """Count waits from now on: another thread calls, whose own waits before are none of these products'."""
        self._waited_before, self._looked_at = self._waited_s(), self._now_s()

    def look(self, took_s: float) -> None:
        """After a slow run: halve the threads if they waited for cores in it."""
        waited, before = self._waited_s(), self._waited_before
        now = self._now_s()
        # Threads wait a little at every wake-up: what counts is the share of all the time since the last look.
        elapsed_s = max(took_s, now - self._looked_at)
        self._waited_before, self._looked_at = waited, now
        if self.active > 1 and waited - before > _MOST_WAIT * elapsed_s:
            self.active //= 2
            # Soon after more threads were tried: the next try waits twice as long.
            is_again = now - self._added_at < _MOST_RETRY_S
            self._retry_s = min(2 * self._retry_s, _MOST_RETRY_S) if is_again else _RETRY_S
            self._idle_before, self._idle_at = self._idle_s(), now
            self._retry_at = now + self._retry_s

    def before_run(self, now_s: float) -> None:
        """With fewer threads than there are: take all again if cores for them have been idle."""
        if self.active == self._most or now_s < self._retry_at:
            return
        idle = self._idle_s()
        idle_cores = (idle - self._idle_before) / max(now_s - self._idle_at, 1e-9)
        self._idle_before, self._idle_at = idle, now_s
        self._retry_at = now_s + _LOOK_S
        if idle_cores > (self._most - self.active) * (1 - _MOST_WAIT):
            self.active, self._added_at = self._most, now_s
            self._waited_before, self._looked_at = self._waited_s(), now_s


def running_threads() -> frozenset[int]:
    """Ids of this process's threads; empty where the system does not tell (anything but Linux)."""
    if not _TASKS.is_dir():
        return frozenset()
    return frozenset(int(task) for task in os.listdir(_TASKS))


def waited_s(threads: Sequence[int]) -> float:
    """Seconds that these threads have been ready to run without a core. Cost: some 5 us a thread."""
    waited_ns = 0
    for thread in threads:
        try:
            waited_ns += int((_TASKS / str(thread) / "schedstat").read_bytes().split()[1])
        except (OSError, IndexError):  # it has ended, or the kernel does not count
            continue
    return waited_ns / 1e9


def idle_s() -> float:
    """Seconds that all cores together have been idle since the machine was started."""
    try:
        first = Path("/proc/stat").read_bytes().split(b"\n", 1)[0].split()
    except OSError:
        return 0.0
    return int(first[4]) / _TICKS_PER_S
