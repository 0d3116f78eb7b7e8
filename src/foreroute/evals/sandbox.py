"""Programs that a model wrote, run where they can do little harm.

Each in a Python process of its own (sandbox_child.py): an empty folder that is removed afterwards, no environment, no
input, limits on time, memory, file bytes and processes, and a refusal of whatever would change files, start or signal
processes or open sockets. Where the system lets this user make namespaces (`unshare`), the process has no network and
no other process in sight. When its time is over it is killed with all that it started.

That is enough for a model that makes mistakes. It is no jail for an adversary: the program can read what this user can
read, and the refusal is Python's own. Run what you distrust in a virtual machine.
"""

import contextlib
import functools
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

TIMED_OUT = "timed out"
_CHILD = Path(__file__).with_name("sandbox_child.py")
_MEMORY_BYTES = 2**30
_PROBE_TIMEOUT_S = 20.0


def isolation_gap() -> str | None:
    """What this system does not allow, as a sentence for the user; None where programs are cut off in full."""
    if _namespaces():
        return None
    return (
        "`unshare --user --net --pid` is not possible for this user: programs are kept from the network and from other "
        "processes by Python's audit hook alone."
    )


def run_program(source: str, timeout_s: float = 5.0) -> str:
    """Run a Python program and say how it ended.

    Args:
        source: the program. It has passed when it comes to its end; leaving early is a failure.
        timeout_s: wall time, in which Python itself has to start too.
    Returns:
        "passed", "timed out", or "failed: " and why.
    """
    secret = secrets.token_hex(16)
    limits = {"RLIMIT_CPU": math.ceil(timeout_s) + 1, "RLIMIT_AS": _MEMORY_BYTES, "RLIMIT_NOFILE": 32}
    task = json.dumps({"source": source, "secret": secret, "limits": limits}).encode()
    with tempfile.TemporaryDirectory(prefix="foreroute-sandbox-") as folder:
        process = subprocess.Popen(
            [*_namespaces(), sys.executable, "-I", "-B", "-c", _CHILD.read_text(encoding="utf-8")],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            output = process.communicate(task, timeout=timeout_s)[0]
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            _kill(process)
    return _result(output, secret)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the process with its whole session; what left the session ends with its namespace."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _result(output: bytes, secret: str) -> str:
    """What the child reported; the secret tells its report from what a program wrote in its place."""
    try:
        report = json.loads(output)
        if report["secret"] == secret:
            return str(report["result"])
    except (ValueError, TypeError, KeyError):
        pass
    return "failed: it ended before its tests did"


@functools.cache
def _namespaces() -> tuple[str, ...]:
    """The command that comes before the program's; () where the system does not allow it."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--user", "--map-current-user", "--net", "--pid", "--fork", "--kill-child", "--")
    try:
        done = subprocess.run(
            [*command, sys.executable, "-I", "-c", ""],
            capture_output=True,
            env={},
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ()
    return command if done.returncode == 0 else ()
