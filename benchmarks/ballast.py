"""Leave only so much memory free: a process that holds the rest, so that every engine is measured with the same amount.

    with Ballast(free_bytes=3 * 2**30):
        ...                                     # 3 GiB of memory, page cache included, are left for what runs here

    python -m benchmarks.ballast --free 3       # by hand: prints READY, holds until it is ended

The pages are anonymous, touched and locked, so neither page cache nor swap can make room for more. No cgroup is needed,
so no right is. Safety: never less than 3 GiB are left; one ballast at a time on a machine; it ends with its parent; and
it offers itself first to the kernel's out-of-memory killer, so that a wrong choice costs a measurement, not a machine.
"""

import argparse
import contextlib
import ctypes
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import NoReturn

MIN_FREE_BYTES = 3 * 2**30
CHUNK_BYTES = 64 * 2**20
SMALL_CHUNK_BYTES = 2 * 2**20
PR_SET_PDEATHSIG = 1


def available_bytes() -> int:
    """Memory that a process could get now, page cache that can be dropped included (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable; a ballast needs Linux 3.14 or newer.")


class BallastError(RuntimeError):
    """The ballast could not be put in place, or did not hold."""


class Ballast:
    """Context manager: while it is open, about `free_bytes` of memory are available to everything else.

    Args:
        free_bytes: what is left, at least 3 GiB.
    Raises:
        BallastError: less than that is free already, or another ballast stands on this machine.
    Cost: about half a second of one core per GiB to begin with, none while it holds.
    """

    def __init__(self, free_bytes: int) -> None:
        if free_bytes < MIN_FREE_BYTES:
            raise BallastError(f"{free_bytes / 2**30:.1f} GiB is too little; a ballast leaves 3 GiB or more.")
        self.free_bytes = free_bytes
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Ballast":
        command = [sys.executable, str(Path(__file__).resolve()), "--free", str(self.free_bytes / 2**30)]
        command += ["--parent", str(os.getpid())]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        if answer != "READY":
            self.close()
            raise BallastError(answer or "The ballast ended before it was in place.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        held = self.is_standing()
        self.close()
        if not held and error is None:
            raise BallastError("The ballast was ended while a measurement ran (out of memory?): the figure is void.")

    def is_standing(self) -> bool:
        """True while the memory is held: a measurement made under a ballast that fell is void."""
        return self.process is not None and self.process.poll() is None

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None


def end_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, however it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before we asked
        sys.exit("The parent of the ballast is gone.")


def touch(nbytes: int) -> mmap.mmap:
    """Take `nbytes` of anonymous memory, whole MiB, with every page present and locked."""
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    if ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes)) != 0:
        noise = os.urandom(2**20)  # no right to lock: at least it cannot be swapped into next to nothing
        for _ in range(nbytes // len(noise)):
            block.write(noise)
    return block


def hold(free_bytes: int) -> list[mmap.mmap]:
    """Take memory until `free_bytes` are left; returns what holds it."""
    blocks: list[mmap.mmap] = []
    while (surplus := available_bytes() - free_bytes) > SMALL_CHUNK_BYTES:
        blocks.append(touch(CHUNK_BYTES if surplus > 2 * CHUNK_BYTES else SMALL_CHUNK_BYTES))
    return blocks


def refuse(reason: str) -> NoReturn:
    """End without a ballast; whoever waits for READY reads the reason."""
    print(reason, flush=True)
    sys.exit(1)


def main() -> None:
    """The process that holds the memory: prints READY or what is wrong, then waits for its end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--free", type=float, required=True, help="GiB to leave free, 3 or more")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="process to end with")
    args = parser.parse_args()
    end_with_parent(args.parent)
    free_bytes = int(args.free * 2**30)
    if free_bytes < MIN_FREE_BYTES:
        refuse("A ballast leaves 3 GiB or more.")
    lock = (Path(tempfile.gettempdir()) / "foreroute-ballast.lock").open("w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        refuse("Another ballast stands on this machine; wait for its end.")
    if available_bytes() < free_bytes:
        refuse(f"Only {available_bytes() / 2**30:.1f} GiB are free, {args.free:.1f} are to be left.")
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    blocks = hold(free_bytes)
    print("READY", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del blocks


if __name__ == "__main__":
    main()
