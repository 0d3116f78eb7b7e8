"""What the benchmarks here share: interleaved repeats, a summary, and a record of where and on what they ran.

A benchmark prints what it does as it goes, and one JSON object as its last line; the same object, with the raw repeats,
goes to benchmarks/results/<date>-<name>.json.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def interleave(contenders: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run the contenders in turn, forwards and backwards (A-B-B-A), so that a drift of the machine hits all alike.

    Args:
        contenders: each runs once per call and returns its own figure.
        repeats: figures wanted per contender; one more, unreported, warms up.
    """
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    order = list(contenders)
    for repeat in range(repeats):
        for name in order if repeat % 2 == 0 else reversed(order):
            figures[name].append(contenders[name]())
    return figures


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
    """What the figures depend on, without the host's name or paths."""
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "load_1_minute": round(os.getloadavg()[0], 1),  # more than the benchmark's own threads: there are neighbours
    }


def record(name: str, result: Mapping[str, Any], raw: Mapping[str, Any] | None = None, *, keep: bool = True) -> None:
    """Print the result as the last line, and keep it with its raw repeats under benchmarks/results/.

    Args:
        name: the benchmark's, for the file.
        result: what is printed.
        raw: what is kept beside it.
        keep: False for a trial that is not for the record.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    whole = {
        "benchmark": name,
        "date": now.isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": machine(),
        **result,
    }
    if keep:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{now:%Y-%m-%d}-{name}.json"
        path.write_text(json.dumps({**whole, "raw": raw or {}}, indent=1) + "\n")
    print(json.dumps(whole), flush=True)


def rounded(value: Any, digits: int = 3) -> Any:
    """The same nest of dicts and lists with its floats rounded."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, Mapping):
        return {key: rounded(part, digits) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part, digits) for part in value]
    return value


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit, with a plus sign where tracked files differ from it; None outside a checkout or before the first."""
    git = ["git", "-C", str(RESULTS.parent)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    clean = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode == 0
    return head.stdout.strip() + ("" if clean else "+")
