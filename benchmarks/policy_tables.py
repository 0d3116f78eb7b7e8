"""The tables of docs/policies.md, from what benchmarks/policies.py recorded.

python -m benchmarks.policy_tables benchmarks/results/2026-11-25-policies-*.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from foreroute.evals.tasks import kinds

_HEAD = ("policy", "memory", "delta nats", "KL", "same top-1", "waited", "stalled", "bytes", "tasks", "of steps")


def mean(row: dict[str, Any], names: set[str]) -> str:
    """Mean accuracy over some kinds, in per cent."""
    shares = [share for kind, share in row["accuracy"].items() if kind in names]
    return f"{100 * sum(shares) / len(shares):.1f}" if shares else "-"


def line(row: dict[str, Any], exact_bytes: float) -> list[str]:
    """One row of a table."""
    known = kinds({})
    steps = {name for name, kind in known.items() if kind.multi_step}
    beside = row.get("bytes_beside_lru", row["bytes_per_token"] / exact_bytes)
    name = f"tolerance {row['tau']:g}" if row["policy"] == "tolerance" else row["policy"]
    return [
        name, row["memory"], f"{row['delta_nats']:+.5f}", f"{row['kl']:.5f}", f"{100 * row['agreement']:.1f} %",
        f"{100 * row['waited_misses']:.1f} %", f"{100 * row['stalled_layers']:.1f} %", f"{beside:.2f}",
        mean(row, set(row["accuracy"])), mean(row, steps),
    ]  # fmt: skip


def table(path: Path) -> str:
    """One recorded run as a Markdown table."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = found["rows"]
    exact_bytes = next(row["bytes_per_token"] for row in rows if row["policy"] == "exact")
    asked = sum(1 for _ in rows[0]["accuracy"])
    lines = [line(row, exact_bytes) for row in rows]
    head = [f"**{found['model']}**, {rows[0]['scored_tokens']:,} tokens, {asked} kinds of tasks", ""]
    return "\n".join(
        [
            *head,
            "| " + " | ".join(_HEAD) + " |",
            "|" + "---|" * len(_HEAD),
            *("| " + " | ".join(one) + " |" for one in lines),
        ]
    )


def main() -> None:
    """Print a table for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    for path in parser.parse_args().files:
        print(table(path), end="\n\n")


if __name__ == "__main__":
    main()
