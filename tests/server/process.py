"""`foreroute serve` as a process, for clients that want a real one."""

import contextlib
import json
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from foreroute.cli.commands import demo
from tests.cli.harness import start

NAME = "foreroute-tiny"


class Process(NamedTuple):
    """url: without /v1. child: the process. started: what it said in JSON when it was ready."""

    url: str
    child: subprocess.Popen[bytes]
    started: dict[str, Any]


@contextlib.contextmanager
def serving(*flags: str, model: Path | None = None, within_s: float = 100.0, before: str = "") -> Iterator[Process]:
    """While inside, the model that ships is served on a free port, in float32 and with half of its experts.

    before: Python that runs first in the process.
    """
    child = start(
        "serve", model or demo.find_model(), "--port", "0", "--json", "--dtype", "float32", "--memory", "50%",
        "--threads", "1", "--predictor", "no", *flags, before=before,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        readable, _, _ = select.select([child.stdout], [], [], within_s)
        line = b""
        while readable and not line.endswith(b"\n"):
            part = child.stdout.read(65536)
            if not part:
                break
            line += part
        assert line, child.stderr.read().decode() if child.poll() is not None else "it does not get ready"
        started = json.loads(line)
        yield Process(started["url"], child, started)
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            raise
        finally:
            child.stdout.close()
            child.stderr.close()
