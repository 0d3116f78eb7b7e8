"""Fair repeats: contenders take turns; medians with spread; and the machine they ran on."""

import datetime
import platform
import statistics
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any, TypeVar

from foreroute.memory.host import cpu_name, ram, usable_cpus
from foreroute.system.limits import load_of_a_minute

_T = TypeVar("_T")


def turns(contenders: Sequence[_T], repeats: int) -> Iterator[tuple[int, _T]]:
    """Yield (repeat, contender); each of `repeats` reverses the order of `contenders` (A-B-B-A) against drift."""
    for repeat in range(repeats):
        for contender in contenders if repeat % 2 == 0 else reversed(contenders):
            yield repeat, contender


def summary(figures: Sequence[float]) -> dict[str, float]:
    """Median and spread (quartiles and extremes) of repeats."""
    low, _, high = statistics.quantiles(figures, n=4, method="inclusive") if len(figures) > 1 else [figures[0]] * 3
    return {
        "median": statistics.median(figures),
        "p25": low,
        "p75": high,
        "min": min(figures),
        "max": max(figures),
        "repeats": len(figures),
    }


def machine() -> dict[str, Any]:
    """Describe the machine, without its name or paths; in a container, the part of it that may be used."""
    load = load_of_a_minute()
    return {
        "cpu": cpu_name() or platform.machine(),
        "cpus": usable_cpus(),
        "memory_gib": round(ram().total_bytes / 2**30, 1),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "load_1_minute": None
        if load is None
        else round(load, 1),  # above the benchmark's own threads: other programs run
    }


def software() -> dict[str, str]:
    """Versions of the software that computes, and the date."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"date": today, **{name: metadata.version(name) for name in ("foreroute", "torch", "transformers")}}
