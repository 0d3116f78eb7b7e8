"""The processor, memory and pages of this machine, and what of them this process may use."""

import os
import platform
from pathlib import Path

from foreroute.cli.machine.findings import OK, PROBLEM, WARNING, Finding
from foreroute.errors import BudgetError
from foreroute.memory.host import ROOT, cpu_limit, cpu_name, ram, read_text, usable_cpus
from foreroute.units import format_memory

_LITTLE_FREE_BYTES = 2 * 2**30
_PAGES = Path("sys/kernel/mm/transparent_hugepage/enabled")


def memory_finding(root: Path = ROOT) -> Finding:
    """The RAM that is free for this process, and the limit on it."""
    try:
        found = ram(root)
    except BudgetError as error:
        return Finding("memory", WARNING, str(error), "Give --memory: it cannot be chosen here.")
    told = f"{format_memory(found.free_bytes)} free of {found}"
    if found.free_bytes >= _LITTLE_FREE_BYTES:
        return Finding("memory", OK, told)
    advice = "End other programs" + (", or raise that limit." if found.limit else ".")
    return Finding("memory", PROBLEM, told, f"{advice} Dense weights and a token's experts have to fit.")


def processor_finding(root: Path = ROOT) -> Finding:
    """The processors that can compute at once, and a number of threads in the environment that is above it."""
    usable, limit = usable_cpus(root), cpu_limit(root)
    told = f"{usable} usable of {os.cpu_count()}, {cpu_name() or platform.machine()}"
    if limit is not None:
        told += f" ({limit.cpus:g} by {limit.name})"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        asked = os.environ.get(name, "")
        if asked.isdecimal() and int(asked) > usable:
            return Finding("processors", WARNING, f"{told}; {name}={asked}", f"Threads would wait: unset {name}.")
    return Finding("processors", OK, told)


def pages_finding(root: Path = ROOT) -> Finding:
    """Whether the system gives memory in huge pages to those who ask."""
    modes = read_text(root / _PAGES)
    if modes is None:
        return Finding("huge pages", OK, "this system does not say; pages are as it gives them")
    chosen = next((mode.strip("[]") for mode in modes.split() if mode.startswith("[")), "")
    if chosen in ("always", "madvise"):
        return Finding("huge pages", OK, chosen)
    advice = f"Products are 3 to 20 % slower without: echo madvise | sudo tee /{_PAGES}"
    return Finding("huge pages", WARNING, chosen or modes.strip(), advice)
