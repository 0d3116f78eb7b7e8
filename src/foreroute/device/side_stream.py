"""Run work on a side CUDA stream, which a graph captures as a branch; on the CPU, deferred until it is joined."""

from collections.abc import Callable
from typing import Protocol

import torch


class Branch(Protocol):
    """Runs one piece of work at a time concurrently with the main stream."""

    def fork(self, work: Callable[[], None]) -> None:
        """Run `work` after all work launched so far on the main stream, concurrently with what follows."""

    def join(self) -> None:
        """Order the main stream's next work after the forked work. Does nothing without any."""


class LateBranch:
    """On the CPU: runs forked work when it is joined, as late as allowed, so that tests notice a missing join."""

    def __init__(self) -> None:
        self._work: Callable[[], None] | None = None

    def fork(self, work: Callable[[], None]) -> None:
        """Keep `work` for `join`."""
        assert self._work is None, "the last piece of work has not been joined"
        self._work = work

    def join(self) -> None:
        """Run the kept work."""
        work, self._work = self._work, None
        if work is not None:
            work()


class StreamBranch:
    """On a GPU: a side stream. Never blocks the host, and can be captured in a graph."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._is_forked = False

    def fork(self, work: Callable[[], None]) -> None:
        """Launch `work` on the side stream, behind the current stream's work."""
        assert not self._is_forked, "the last piece of work has not been joined"
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        self._is_forked = True

    def join(self) -> None:
        """Make the current stream wait for the side stream."""
        if self._is_forked:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._is_forked = False


def branch_of(device: torch.device) -> Branch:
    """Make the branch for a device."""
    return StreamBranch(device) if device.type == "cuda" else LateBranch()
