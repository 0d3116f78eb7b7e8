"""The host's RAM and CPUs: how much this process may use, and how much RAM experts get.

Reads the machine's figures and every limit on this process: control groups (of a container, for example), `ulimit`, and
CPU affinity. The tightest holds. Other modules ask here.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.errors import BudgetError
from foreroute.memory.cgroups import CpuLimit, MemoryLimit, cpu_limits, memory_limits
from foreroute.memory.proc import ROOT, machine_bytes, process_bytes, soft_limit
from foreroute.memory.serving_budget import CHOSEN_RESERVE_BYTES
from foreroute.units import format_memory, parse_memory

# (name in /proc/self/limits, its current use in /proc/self/status, the shell's name for it)
_PROCESS_LIMITS = (("Max address space", "VmSize", "ulimit -v"), ("Max data size", "VmData", "ulimit -d"))


@dataclass(frozen=True)
class Ram:
    """RAM that this process may use. total_bytes: used or not; free_bytes: available without swapping.

    limit: the setting that makes total_bytes less than the machine's RAM; None without one.
    """

    total_bytes: int
    free_bytes: int
    limit: str | None

    def __str__(self) -> str:
        """The total and the limit behind it, for messages."""
        if self.limit is None:
            return f"this machine's RAM ({format_memory(self.total_bytes)})"
        return f"the RAM that this process may use ({format_memory(self.total_bytes)}, by {self.limit})"


def ram(root: Path = ROOT) -> Ram:
    """Measure the RAM now.

    Args:
        root: where /proc and /sys lie.
    Raises:
        BudgetError: the system does not report it.
    """
    total, free = machine_bytes("MemTotal", root), machine_bytes("MemAvailable", root)
    if total is None or free is None:
        raise BudgetError("This system does not say how much RAM is free (/proc/meminfo).")
    limits = [*memory_limits(root), *_process_limits(root)]
    tightest = min(limits, key=lambda limit: limit.limit_bytes, default=None)
    free = min([free, *(limit.left_bytes for limit in limits)])
    if tightest is None or tightest.limit_bytes >= total:
        return Ram(total, free, None)
    return Ram(tightest.limit_bytes, free, tightest.name)


def available_ram() -> int:
    """Bytes that this process can allocate without swapping and without being killed."""
    return ram().free_bytes


def cpu_limit(root: Path = ROOT) -> CpuLimit | None:
    """The tightest CPU limit of control groups below `root`, if lower than the CPUs this process may run on."""
    limits = [limit for limit in cpu_limits(root) if limit.cpus < _runs_on()]
    return min(limits, key=lambda limit: limit.cpus, default=None)


def usable_cpus(root: Path = ROOT) -> int:
    """Threads of this process that can compute at the same time; at least 1.

    A limit of 1.5 CPUs gives 2: one thread would not use it up.
    """
    limit = cpu_limit(root)
    return _runs_on() if limit is None else max(1, math.ceil(limit.cpus))


def choose_memory(
    asked: int | str | None,
    table: ExpertTable,
    dense_bytes: int,
    beside_bytes: int = 0,
    free_ram_bytes: int | None = None,
) -> int:
    """Choose the budget in bytes: as asked, or the free RAM beside the dense part and a reserve.

    Args:
        asked: as --memory. table: the experts. dense_bytes: of the dense part.
        beside_bytes: of KV cache, where it is reserved. free_ram_bytes: None measures it now.
    Raises:
        BudgetError: not a size, or more than this process may have.
    """
    whole = table.whole_bytes
    if asked is not None:
        budget, there = parse_memory(asked, whole), ram()
        if budget > there.total_bytes and budget > whole:
            raise BudgetError(
                f"--memory {asked} is more than {there}, and more than all experts need ({format_memory(whole)})."
            )
        if min(budget, whole) > there.total_bytes:
            raise BudgetError(f"--memory {asked} is more than {there}. Leave --memory out to have it chosen.")
        return budget
    free = available_ram() if free_ram_bytes is None else free_ram_bytes
    return min(whole, max(0, free - dense_bytes - CHOSEN_RESERVE_BYTES - beside_bytes))


def _process_limits(root: Path) -> list[MemoryLimit]:
    limits = []
    for name, taken_name, shown in _PROCESS_LIMITS:
        limit = soft_limit(name, root)
        if limit is not None:
            taken = process_bytes(taken_name, root) or 0
            limits.append(MemoryLimit(limit, max(0, limit - taken), shown))
    return limits


def _runs_on() -> int:
    """CPUs that this process may run on: by cpuset or taskset, or all."""
    return len(os.sched_getaffinity(0))
