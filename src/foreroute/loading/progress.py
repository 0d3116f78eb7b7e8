"""How far a load is, in bytes: dense weights first, then the experts that host memory holds."""

import threading

from foreroute.model.build.dense_blocks import DenseBlocks
from foreroute.types import Progress


class LoadedBytes:
    """Counts what a load reads, and calls `progress` with (bytes read, bytes to read), from one thread at a time.

    How many experts host memory holds is known once the dense weights are in memory: the total grows then.

    Args:
        dense_nbytes: of the dense weights, as they will be in memory.
    """

    def __init__(self, progress: Progress, dense_nbytes: int) -> None:
        self._progress, self._dense_nbytes, self._done = progress, dense_nbytes, 0
        self._lock = threading.Lock()  # transformers reads tensors in several threads

    def dense(self, nbytes: int) -> None:
        """Count a tensor. Tied ones and those that are read twice never make it more than all."""
        with self._lock:
            self._done = min(self._done + nbytes, self._dense_nbytes)
            self._progress(self._done, self._dense_nbytes)

    def watch(self, blocks: DenseBlocks | None) -> None:
        """Count what stays in blocks too, where something does."""
        if blocks is not None:
            blocks.noted = self.dense

    def end_dense(self) -> None:
        """All dense weights are in memory, also what was not counted, such as buffers."""
        self.dense(self._dense_nbytes)

    def experts(self, expert_nbytes: int) -> Progress:
        """What is called with (experts, all of them) while host memory is filled with experts of this length."""
        before = self._dense_nbytes
        return lambda done, total: self._progress(before + done * expert_nbytes, before + total * expert_nbytes)
