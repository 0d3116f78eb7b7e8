"""One line to a process and one back, within a time."""

import contextlib
import os
import queue
import selectors
import subprocess
import threading
import time
from typing import Any

_set_blocking: Any = getattr(os, "set_blocking", None)


def exchange(worker: "subprocess.Popen[bytes]", line: bytes, within_s: float) -> bytes | None:
    """Send `line` and wait for one in reply; None at a timeout or when the process has ended.

    Args:
        worker: both of its pipes are ours, and used by one thread at a time. After None it has to be ended.
    """
    if hasattr(selectors, "PollSelector") and _set_blocking is not None:
        return _polled(worker, line, within_s)
    return _by_threads(worker, line, within_s)


def _polled(worker: "subprocess.Popen[bytes]", line: bytes, within_s: float) -> bytes | None:
    assert worker.stdin is not None
    assert worker.stdout is not None
    until = time.monotonic() + within_s
    sending, reading = worker.stdin.fileno(), worker.stdout.fileno()
    # Asked for before; a checker of types for another system knows none of them.
    polling: Any = selectors
    _set_blocking(sending, False)
    got = bytearray()
    # Not `select`, which cannot handle descriptors above 1023; a server with many connections has them.
    with polling.PollSelector() as ready:
        ready.register(reading, selectors.EVENT_READ)
        if line:
            ready.register(sending, selectors.EVENT_WRITE)
        while not got.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0:
                return None
            able = [key.fd for key, _ in ready.select(left)]
            if sending in able:
                try:
                    line = line[os.write(sending, line[:65536]) :]
                except BrokenPipeError:
                    return None
                if not line:
                    ready.unregister(sending)
            if reading not in able:
                continue
            part = os.read(reading, 2**20)
            if not part:
                _note_end(worker)
                return None
            got += part
    return bytes(got)


def _by_threads(worker: "subprocess.Popen[bytes]", line: bytes, within_s: float) -> bytes | None:
    """The same where pipes cannot be polled (Windows): one thread writes and one reads, until the process ends."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    sending, reading = worker.stdin.fileno(), worker.stdout.fileno()
    answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def write() -> None:
        left = memoryview(line)
        with contextlib.suppress(OSError):  # it has ended: the reader says so
            while left:
                left = left[os.write(sending, left[:65536]) :]

    def read() -> None:
        got = bytearray()
        with contextlib.suppress(OSError):
            while not got.endswith(b"\n"):
                part = os.read(reading, 2**20)
                if not part:
                    break
                got += part
        answers.put(bytes(got))

    for act in (write, read):
        threading.Thread(target=act, name="foreroute-pipe", daemon=True).start()
    try:
        answer = answers.get(timeout=within_s)
    except queue.Empty:
        return None
    if answer.endswith(b"\n"):
        return answer
    _note_end(worker)
    return None


def _note_end(worker: "subprocess.Popen[bytes]") -> None:
    """Let `poll` notice that it has ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(1)
