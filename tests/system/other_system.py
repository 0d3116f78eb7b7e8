"""This process made to look like another system's: what Linux alone has is taken away, before foreroute is imported.

Python's own modules for this system are imported first, and before a model is run the libraries' too: those of another
system do not ask for what it lacks.
"""

# F401: imported for what they ask of this system at import, as the docstring says.
import builtins
import errno
import io
import logging  # noqa: F401
import mmap
import os
import random  # noqa: F401
import selectors
import signal
import subprocess  # noqa: F401
import sys
from collections.abc import Callable, Iterable
from typing import Any

# Named "module" or "module.attribute"; "/proc" is that folder.
MACOS = (
    "os.O_DIRECT", "os.sched_getaffinity", "os.posix_fallocate", "os.fdatasync", "errno.EREMOTEIO",
    "mmap.MADV_HUGEPAGE", "/proc",
)  # fmt: skip
# macOS before 11.
OLDER_MACOS = (*MACOS, "os.preadv", "os.pwritev")
WINDOWS = (
    *OLDER_MACOS, "fcntl", "resource", "termios", "tty", "readline", "pwd", "grp", "os.readv", "os.pread", "os.pwrite",
    "os.O_CLOEXEC", "os.register_at_fork", "os.getloadavg", "os.sysconf", "os.major", "os.minor", "os.set_blocking",
    "os.geteuid", "mmap.MAP_PRIVATE", "mmap.MAP_ANONYMOUS", "selectors.PollSelector", "signal.setitimer",
)  # fmt: skip
_MODULES = {"os": os, "errno": errno, "mmap": mmap, "selectors": selectors, "signal": signal}


def hide(names: Iterable[str]) -> None:
    """Take these away for the rest of this process; other programs that it starts have them."""
    for name in names:
        module, _, attribute = name.partition(".")
        if name == "/proc":
            _hide_proc()
        elif attribute:
            delattr(_MODULES[module], attribute)
        else:
            sys.modules[name] = None  # import then fails, as Python documents it


def _hide_proc() -> None:
    import psutil

    # It reads /proc here, and asks the system in another way elsewhere: it says now what it said before.
    found, process = psutil.virtual_memory(), psutil.Process()
    used = process.memory_info()
    process.memory_info = lambda: used
    psutil.virtual_memory, psutil.Process = lambda: found, lambda: process
    for module, function in ((builtins, "open"), (io, "open"), (os, "open"), (os, "stat"), (os, "listdir"),
                             (os, "scandir")):  # fmt: skip
        setattr(module, function, _without_proc(getattr(module, function)))


def _without_proc(function: Callable[..., Any]) -> Callable[..., Any]:
    def looking(path: Any = ".", *args: Any, **options: Any) -> Any:
        if _is_below(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return function(path, *args, **options)

    return looking


def _is_below(path: Any) -> bool:
    if isinstance(path, int):
        return False
    named = os.fsdecode(path)
    return named in ("/proc", "/sys") or named.startswith(("/proc/", "/sys/"))
