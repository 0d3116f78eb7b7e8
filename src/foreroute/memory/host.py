"""The host's RAM and CPUs: how much of them this process may use.

Reads the machine's figures (/proc; by psutil on a system without) and every limit on this process: control groups (of
a container, for example), `ulimit`, and CPU affinity. The tightest holds. Other modules ask here.

A process is in one group of each hierarchy: one of version 2, and up to one per controller of version 1; systems have
either, or both. Each group above it up to the root may have a limit as well. Inside a container the tree may begin at
the container's own group: groups above it are not visible.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from foreroute.errors import BudgetError
from foreroute.system.limits import usable_processors
from foreroute.system.memory import machine_memory
from foreroute.units import format_memory

# Root of /proc and /sys; tests replace it.
ROOT = Path("/")
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+\s*(.*)")
_RESIDENT = re.compile(r"Rss:\s+(\d+) kB")

# By version: the files with a limit, and the one with current use.
_MEMORY_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes"),
    2: (("memory.max", "memory.high"), "memory.current"),
}

# (name in /proc/self/limits, its current use in /proc/self/status, the shell's name for it)
_PROCESS_LIMITS = (("Max address space", "VmSize", "ulimit -v"), ("Max data size", "VmData", "ulimit -d"))


@dataclass(frozen=True)
class Mapping:
    """A mapped address range of this process. path: of the mapped file, "" for none."""

    addresses: range
    path: str
    resident_bytes: int


def read_text(path: Path) -> str | None:
    """Read a kernel file; None where it is absent or unreadable."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def process_bytes(name: str, root: Path = ROOT) -> int | None:
    """The field `name` of this process's /proc/self/status below `root` (VmRSS, VmHWM, VmSize), in bytes."""
    return _kib_field(root / "proc/self/status", name)


def soft_limit(name: str, root: Path = ROOT) -> int | None:
    """The soft limit `name` of this process ("Max address space") below `root`, in bytes; None without one."""
    for line in (read_text(root / "proc/self/limits") or "").splitlines():
        if line.startswith(f"{name} "):
            value = line[len(name) :].split()[0]
            return int(value) if value.isdecimal() else None
    return None


def reset_peak() -> bool:
    """Reset VmHWM, the peak of resident bytes; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def mappings() -> Iterator[Mapping]:
    """This process's mappings, with the bytes of each that are in RAM."""
    found: re.Match[str] | None = None
    for line in (read_text(ROOT / "proc/self/smaps") or "").splitlines():
        if begun := _MAPPING.fullmatch(line):
            found = begun
        elif found is not None and (resident := _RESIDENT.fullmatch(line)):
            yield Mapping(range(int(found[1], 16), int(found[2], 16)), found[3], int(resident[1]) * 1024)


def cpu_name() -> str | None:
    """The processor's name."""
    lines = (read_text(ROOT / "proc/cpuinfo") or "").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _kib_field(path: Path, name: str) -> int | None:
    for line in (read_text(path) or "").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


@dataclass(frozen=True)
class MemoryLimit:
    """A group's memory limit. left_bytes: the part of limit_bytes that is not used. name: of the setting."""

    limit_bytes: int
    left_bytes: int
    name: str


@dataclass(frozen=True)
class CpuLimit:
    """CPU time that a group may use, in processors; may be a fraction. name: of the setting."""

    cpus: float
    name: str


@dataclass(frozen=True)
class _Group:
    folder: Path
    version: int

    def number(self, name: str) -> int | None:
        """Read a number from file `name`; None for "max", and for an unreadable or absent file."""
        text = (read_text(self.folder / name) or "").strip()
        return int(text) if text.isdecimal() else None

    def table(self, name: str) -> dict[str, int]:
        """Read a file whose lines are names and numbers."""
        pairs = [line.split() for line in (read_text(self.folder / name) or "").splitlines()]
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def memory_limits(root: Path) -> list[MemoryLimit]:
    """Every memory limit of this process's groups and of those above them.

    Args:
        root: where /proc and /sys lie.
    """
    found = [_memory_limit(group) for group in _groups(root, "memory")]
    return [limit for limit in found if limit is not None]


def cpu_limits(root: Path) -> list[CpuLimit]:
    """Every CPU limit of these groups, found below `root`; which CPUs may be used is a matter of affinity."""
    found = [_cpu_limit(group) for group in _groups(root, "cpu")]
    return [limit for limit in found if limit is not None]


def _memory_limit(group: _Group) -> MemoryLimit | None:
    names, used_name = _MEMORY_FILES[group.version]
    stat = group.table("memory.stat")
    limits = {name: limit for name in names if (limit := group.number(name)) is not None}
    if "hierarchical_memory_limit" in stat:
        # Version 1: the tightest of all groups above, including those not visible from here.
        limits["hierarchical_memory_limit"] = stat["hierarchical_memory_limit"]
    if not limits:
        return None
    name = min(limits, key=lambda name: limits[name])
    used = group.number(used_name) or 0
    # Reclaimable when memory is needed: counts as free, as in MemAvailable. Version 1's "total_" includes child groups.
    going = ("inactive_file", "active_file", "slab_reclaimable")
    taken = max(0, used - sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in going))
    return MemoryLimit(limits[name], max(0, limits[name] - taken), f"{name} of its control group")


def _cpu_limit(group: _Group) -> CpuLimit | None:
    if group.version == 2:
        name = "cpu.max"
        quota, period = [*(read_text(group.folder / name) or "").split(), "", ""][:2]
    else:
        name = "cpu.cfs_quota_us"
        quota = (read_text(group.folder / name) or "").strip()
        period = (read_text(group.folder / "cpu.cfs_period_us") or "").strip()
    if not (quota.isdecimal() and period.isdecimal() and int(quota) and int(period)):
        return None  # "max", -1, or no such file
    return CpuLimit(int(quota) / int(period), f"{name} of its control group")


def _groups(root: Path, controller: str) -> Iterator[_Group]:
    """This process's groups in which `controller` may have limits, each followed by those above it."""
    own = _own_groups(root)
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
        mount, _, kind = line.partition(" - ")
        fields, kinds = mount.split(), kind.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        if kinds[0] == "cgroup2":
            name, version = "", 2
        elif kinds[0] == "cgroup" and controller in kinds[2].split(","):
            name, version = controller, 1
        else:
            continue
        if name in own:
            top = root / _unescaped(fields[4]).lstrip("/")
            parts = _parts_below(own[name], _unescaped(fields[3]))
            for depth in range(len(parts), -1, -1):
                yield _Group(top.joinpath(*parts[:depth]), version)


def _own_groups(root: Path) -> dict[str, str]:
    """This process's group by controller of version 1; "" for version 2."""
    groups = {}
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        groups.update(dict.fromkeys(controllers.split(","), path))
    return groups


def _parts_below(path: str, mounted: str) -> tuple[str, ...]:
    """A group's folders below the mounted one; none where it lies elsewhere: the mounted one must do."""
    whole, above = Path(path), Path(mounted)
    if ".." in whole.parts or not whole.is_relative_to(above):
        return ()
    return whole.relative_to(above).parts


def _unescaped(field: str) -> str:
    """A path of mountinfo, where spaces are octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)


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
    total, free = (_kib_field(root / "proc/meminfo", name) for name in ("MemTotal", "MemAvailable"))
    if total is None or free is None:
        # Of a made-up machine only its own files tell.
        told = machine_memory() if root == ROOT else None
        if told is None:
            raise BudgetError("This system does not say how much RAM is free (/proc/meminfo, or the package psutil).")
        total, free = told
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
    return usable_processors()
