"""Repeats that can be believed: contenders in turn, medians with their spread, and what machine it was."""

import datetime
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any, TypeVar

from foreroute.memory.host import ram, usable_cpus
from foreroute.memory.proc import cpu_name

_T = TypeVar("_T")


def turns(contenders: Sequence[_T], repeats: int) -> Iterator[tuple[int, _T]]:
    """(repeat, contender), every repeat in the opposite order of the one before (A-B-B-A): drift hits all alike."""
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
    """What the figures depend on, without the host's name or paths; of a container what it may use."""
    return {
        "cpu": cpu_name() or platform.machine(),
        "cpus": usable_cpus(),
        "memory_gib": round(ram().total_bytes / 2**30, 1),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "load_1_minute": round(os.getloadavg()[0], 1),  # more than the benchmark's own threads: there are neighbours
    }


def software() -> dict[str, str]:
    """Versions of what computes, and the day."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"date": today, **{name: metadata.version(name) for name in ("foreroute", "torch", "transformers")}}
