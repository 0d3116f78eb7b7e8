"""The inside of the sandbox: takes a program from standard input, gives up what it does not need, runs it, reports.

Started by sandbox.py as `python -I -c <this text>`, in an empty folder with an empty environment: imports nothing of
ours. The report is one JSON object on what was standard output; the program itself has neither input nor output.
"""

import json
import os
import resource
import sys
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events, by how they begin: changes to files, other processes, the network, limits, and ways around this list.
_REFUSED = (
    "os.chmod", "os.chown", "os.exec", "os.fork", "os.kill", "os.link", "os.mkdir", "os.posix_spawn",
    "os.remove", "os.rename", "os.rmdir", "os.setxattr", "os.spawn", "os.symlink", "os.system", "os.truncate",
    "os.utime", "pty.", "resource.", "shutil.", "signal.pthread_kill", "socket.", "sqlite3.", "subprocess.",
    "ctypes.dlsym", "ctypes.call_function",
)  # fmt: skip


def _give_up(limits: dict[str, int]) -> None:
    """Lower the limits for good, then refuse what they do not stop."""
    for name, most in {**limits, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(number, (least, least))

    def refuse(event: str, args: tuple[Any, ...]) -> None:
        # Opening for writing empties or creates a file, which no limit on its bytes prevents.
        if event.startswith(_REFUSED) or (event == "open" and args[2] & _WRITES):
            raise PermissionError(f"not in the sandbox: {event}")

    sys.addaudithook(refuse)


def _run(source: str) -> str:
    try:
        exec(compile(source, "<solution>", "exec"), {"__name__": "solution"})
    except BaseException as error:  # noqa: BLE001 - whatever a program ends with, exits too, is its result
        return f"failed: {type(error).__name__}: {error}"[:200]
    return "passed"


def main() -> None:
    """Run the task on standard input: {source, secret, limits}."""
    task = json.load(sys.stdin)
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    # Before numpy is imported: its threads would each reserve memory, of which there is little.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    _give_up(task["limits"])
    result = _run(task["source"])
    os.write(report, json.dumps({"secret": task["secret"], "result": result}).encode())
    # No clean-up of the program's own, no waiting for its threads.
    os._exit(0)


if __name__ == "__main__":
    main()
