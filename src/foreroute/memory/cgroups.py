"""Read the memory and CPU limits that control groups (containers, for example) put on this process.

A process is in one group of each hierarchy: one of version 2, and up to one per controller of version 1; systems have
either, or both. Each group above it up to the root may have a limit as well, and the tightest holds. Inside a container
the tree may begin at the container's own group: groups above it are not visible.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from foreroute.memory.proc import read_text

# By version: the files with a limit, and the one with current use.
_MEMORY_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes"),
    2: (("memory.max", "memory.high"), "memory.current"),
}


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
