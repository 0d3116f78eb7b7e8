"""Read figures of this machine and process from /proc; None where a file does not exist."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Root of /proc and /sys; tests replace it.
ROOT = Path("/")
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+\s*(.*)")
_RESIDENT = re.compile(r"Rss:\s+(\d+) kB")


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


def machine_bytes(name: str, root: Path = ROOT) -> int | None:
    """The field `name` of /proc/meminfo below `root` (MemTotal, MemAvailable), in bytes."""
    return _kib_field(root / "proc/meminfo", name)


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
