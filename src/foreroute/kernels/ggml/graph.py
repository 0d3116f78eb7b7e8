"""Graphs of products over memory that is ours, built once and run often, on one pool of threads.

ggml aborts the process where an operation cannot take its tensors, so that what is given here was checked before:
columns are whole blocks, and ids are slots.
"""

import ctypes as c
import threading
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from foreroute.kernels.ggml.library import GgmlError, Library, open_library
from foreroute.kernels.ggml.structs import ComputePlan, ContextParams
from foreroute.kernels.ggml.types import BlockType

# A pointer to a Tensor; ctypes types such pointers by value only.
TensorRef = Any
# How long a thread polls for the next graph before it sleeps, in ggml's units (0 sleeps at once, 100 the longest).
_POLL = 50


class Runner:
    """Runs graphs, one at a time, on `num_threads` threads: the caller's and ggml's own.

    Args:
        library: see library.py. poll: how long its threads poll between graphs, 0 to 100.
    """

    def __init__(self, library: Library, num_threads: int, poll: int = _POLL) -> None:
        self.library = library
        self.num_threads = num_threads
        params = library.ggml_threadpool_params_default(num_threads)
        params.poll = poll
        self.pool = library.ggml_threadpool_new(c.byref(params))
        if not self.pool:
            raise GgmlError(f"ggml could not start {num_threads} threads.")
        self._work = np.empty(1 << 20, dtype=np.uint8)
        self._lock = threading.Lock()
        weakref.finalize(self, library.ggml_threadpool_free, self.pool)

    def compute(self, graph: int, plan: ComputePlan) -> None:
        """Compute a graph; its inputs must be written, and its outputs are when this returns."""
        with self._lock:
            if plan.work_size > len(self._work):
                self._work = np.empty(int(plan.work_size), dtype=np.uint8)
            plan.work_data = self._work.ctypes.data
            status = self.library.ggml_graph_compute(graph, c.byref(plan))
        if status:
            raise GgmlError(f"ggml could not compute a graph (status {status}).")


class Graph:
    """A graph in the making: add tensors and operations, then `finish`; afterwards `run` as often as wanted.

    Tensors have no memory of ggml's: `place` says where one lies.

    Args:
        num_tensors: the most tensors, operations included.
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
        self._graph = 0
        self._plan = ComputePlan()

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
        self._graph = library.ggml_new_graph_custom(self.context, self._num_tensors, False)
        for output in outputs:
            library.ggml_build_forward_expand(self._graph, output)
        self._plan = library.ggml_graph_plan(self._graph, self._runner.num_threads, self._runner.pool)

    def run(self) -> None:
        """Compute the outputs from what lies in the inputs' memory now."""
        self._runner.compute(self._graph, self._plan)


def place(tensor: TensorRef, address: int) -> None:
    """Say where a tensor's memory is; it must stay there as long as the graph runs."""
    tensor.contents.data = address


@lru_cache(maxsize=8)
def shared_runner(num_threads: int) -> Runner:
    """The process's runner with so many threads: models that are open together take turns on it."""
    return Runner(open_library(), num_threads)
