"""What the benchmarks here share: interleaved repeats, a summary, and a record of where and on what they ran.

A benchmark prints what it does as it goes, and one JSON object as its last line; the same object, with the raw repeats,
goes to benchmarks/results/<date>-<name>.json.
"""

import datetime
import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foreroute.bench.repeats import machine, summary, turns
from foreroute.whole_files import atomic_write

__all__ = ["RESULTS", "interleave", "machine", "record", "rounded", "summary"]

RESULTS = Path(__file__).parent / "results"


def interleave(contenders: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run the contenders in `turns`.

    Args:
        contenders: each runs once per call and returns its own figure.
        repeats: figures wanted per contender; one more, unreported, warms up.
    """
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _, name in turns(list(contenders), repeats):
        figures[name].append(contenders[name]())
    return figures


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
        with atomic_write(path) as beside:
            beside.write_text(json.dumps({**whole, "raw": raw or {}}, indent=1) + "\n", encoding="utf-8")
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


def _commit() -> str | None:
    """The commit, with a plus sign where tracked files differ from it; None outside a checkout or before the first."""
    git = ["git", "-C", str(RESULTS.parent)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    clean = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode == 0
    return head.stdout.strip() + ("" if clean else "+")
