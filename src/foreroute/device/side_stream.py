"""Work beside the main line: on a GPU a forked stream, which a graph records as a branch; on the CPU, later."""

from collections.abc import Callable
from typing import Protocol

import torch


class Branch(Protocol):
    """At most one piece of work beside the main line at a time."""

    def fork(self, work: Callable[[], None]) -> None:
        """Run `work` after all that the main line has been given so far, beside what it is given from now on."""

    def join(self) -> None:
        """What the main line is given from now on comes after the forked work. Nothing happens without any."""


class LateBranch:
    """On the CPU: forked work runs when it is joined, the latest that it may, so that a missing join shows."""

    def __init__(self) -> None:
        self._work: Callable[[], None] | None = None

    def fork(self, work: Callable[[], None]) -> None:
        """Keep it."""
        assert self._work is None, "the last piece of work has not been joined"
        self._work = work

    def join(self) -> None:
        """Run it."""
        work, self._work = self._work, None
        if work is not None:
            work()


class StreamBranch:
    """On a GPU: a stream of its own. Nothing here waits on the host, and all of it can be captured."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._is_forked = False

    def fork(self, work: Callable[[], None]) -> None:
        """Launch it on the stream, behind the current one."""
        assert not self._is_forked, "the last piece of work has not been joined"
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        self._is_forked = True

    def join(self) -> None:
        """The current stream waits for it."""
        if self._is_forked:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._is_forked = False


def branch_of(device: torch.device) -> Branch:
    """The branch for a device."""
    return StreamBranch(device) if device.type == "cuda" else LateBranch()
