"""README's tables, from the results that are kept: `python -m benchmarks.readme_tables` writes them into README.

    python -m benchmarks.readme_tables            # rewrite what stands between the comments that name a table
    python -m benchmarks.readme_tables --check    # exit code 1 where README differs

Of several results of one benchmark the newest counts. What is a forecast is `foreroute plan`'s arithmetic
(foreroute/cli/forecast.py) on a published model's sizes, with a token's compute as it was measured here.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreroute.cli.forecast import forecast

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
Result = dict[str, Any]
# What is measured: files of published_files.py, by their name in results.
MODELS = {"qwen3": "Qwen3-30B-A3B, Q4_K_M, 18.6 GB", "gpt-oss": "gpt-oss-20b, MXFP4, 12.1 GB"}
SHARES = {"resident": "100 %", "50": "50 %", "25": "25 %"}
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """A published model whose layers are those of a measured one. RAM beside experts: dense weights and what runs."""

    name: str
    like: str
    layers: int
    like_layers: int
    experts: int
    top_k: int
    expert_bytes: int
    beside_bytes: int


# Experts: Qwen3's gate and up in Q4_K, down in Q4_K or Q6_K by turns; gpt-oss's in MXFP4, with biases.
_QWEN3_EXPERT = 2048 * 768 * (3 * 4.5 + (6.5625 - 4.5) / 2) / 8
_OSS_EXPERT = 3 * 2880 * 2880 * 4.25 / 8 + 3 * 2880 * 4
QWEN3 = Sizes("Qwen3-30B-A3B, Q4_K_M", "qwen3", 48, 48, 128, 8, int(_QWEN3_EXPERT), int(2.1 * GIB))
OSS_120B = Sizes("gpt-oss-120b, MXFP4, 63 GB", "gpt-oss", 36, 24, 128, 4, int(_OSS_EXPERT), int(4.0 * GIB))
# Model, GiB of free RAM, the disk's GB/s.
FORECASTS = ((QWEN3, 8, 0.5), (QWEN3, 8, 5.0), (OSS_120B, 16, 2.4), (OSS_120B, 32, 2.4), (OSS_120B, 32, 5.0))


def newest(folder: Path = RESULTS) -> dict[str, Result]:
    """The newest result of each benchmark of published files, by its name."""
    found: dict[str, Result] = {}
    for path in folder.glob("*-published-*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        name = result["benchmark"].removeprefix("published-")
        if name not in found or result["date"] > found[name]["date"]:
            found[name] = result
    return found


def row_of(result: Result, engine: str) -> Result | None:
    """An engine's row; None where it found no room."""
    (row,) = (one for one in result["rows"] if one["engine"].startswith(engine) and _kind(one["engine"]) == engine)
    return row if "ms_per_token" in row else None


def _kind(engine: str) -> str:
    return engine.partition("=")[0]


FROM_FILE, PACKED, LLAMA, LLAMA_REPACKED = "foreroute", "foreroute:packed", "llama.cpp", "llama.cpp:repack"


def speeds(results: Mapping[str, Result]) -> str:
    """ms/token of each engine at each memory, the smallest in bold; then prompts."""
    lines = [
        "| file, share of the experts in memory | foreroute, from the file | foreroute, packed "
        "| llama.cpp, no repacking | llama.cpp |",
        "|---|---|---|---|---|",
    ]
    for model, title in MODELS.items():
        for share, percent in SHARES.items():
            result = results[f"{model}-{share}-32"]
            left = result["options"]["left"]
            rows = [row_of(result, engine) for engine in (FROM_FILE, PACKED, LLAMA, LLAMA_REPACKED)]
            times = [None if row is None else round(row["ms_per_token"]["median"]) for row in rows]
            best = min(one for one in times if one is not None)
            cells = ["no room" if one is None else f"**{one}**" if one == best else str(one) for one in times]
            about = title if share == "resident" else "the same"
            room = "" if left is None else f" ({left:g} GiB left to each)"
            lines.append(f"| {about}, {percent}{room} | " + " | ".join(cells) + " |")
    lines += ["", "A prompt of 512 tokens with everything in memory, tokens/s:"]
    for model, title in MODELS.items():
        result = results[f"{model}-resident-512"]
        ours, plain, repacked = (
            f"{result['options']['prompt_tokens'] / found['prompt_s']['median']:.0f}" if found else "no room"
            for found in (row_of(result, engine) for engine in (FROM_FILE, LLAMA, LLAMA_REPACKED))
        )
        ending = ";" if title != [*MODELS.values()][-1] else "."
        lines.append(
            f"{title.partition(',')[0]} {ours} (llama.cpp without repacking {plain}, as it comes {repacked}){ending}"
        )
    return "\n".join(lines)


def fits(results: Mapping[str, Result]) -> str:
    """Free RAM and disk -> model -> tokens/s: what was measured, then what is a forecast."""
    lines = ["| free RAM | disk | model | tokens/s | |", "|---|---|---|---|---|"]
    for model, title in MODELS.items():
        for share in reversed(SHARES):
            result = results[f"{model}-{share}-32"]
            row = row_of(result, PACKED)
            assert row is not None
            # With everything resident no ballast says how much was left: what the process took.
            gib = result["options"]["left"] or row["peak_rss_bytes"] / GIB
            speed = 1000 / row["ms_per_token"]["median"]
            disk = f"{row['read_bytes_per_s'] / 1e9:.1f} GB/s" if result["options"]["left"] else "any"
            lines.append(f"| {gib:.1f} GiB | {disk} | {title} | {speed:.1f} | measured |")
    for sizes, gib, disk in FORECASTS:
        lines.append(f"| {gib} GiB | {disk:g} GB/s | {sizes.name} | {_span(sizes, gib, disk, results)} | forecast |")
    half = results["qwen3-50-32"]
    row = row_of(half, PACKED)
    assert row is not None
    gib = half["options"]["left"]
    known = _span(QWEN3, gib, row["read_bytes_per_s"] / 1e9, results)
    measured = 1000 / row["ms_per_token"]["median"]
    lines += ["", f"Where {measured:.1f} was measured ({gib:g} GiB, Qwen3), the same arithmetic forecasts {known}."]
    return "\n".join(lines)


def _span(sizes: Sizes, ram_gib: float, disk_gb_per_s: float, results: Mapping[str, Result]) -> str:
    slowest, quickest = expected(sizes, ram_gib, disk_gb_per_s, results)
    return f"{slowest:.1f} to {quickest:.1f}"


def expected(sizes: Sizes, ram_gib: float, disk_gb_per_s: float, results: Mapping[str, Result]) -> tuple[float, float]:
    """Tokens per second, from reads that do not overlap compute to reads that overlap it fully: plan's likely case."""
    row = row_of(results[f"{sizes.like}-resident-32"], PACKED)
    assert row is not None
    compute_ms = row["ms_per_token"]["median"] * sizes.layers / sizes.like_layers
    all_experts = sizes.layers * sizes.experts * sizes.expert_bytes
    share = min(1.0, (ram_gib * GIB - sizes.beside_bytes) / all_experts)
    (likely,) = (
        case
        for case in forecast(
            share, sizes.layers * sizes.top_k, sizes.expert_bytes, disk_gb_per_s * 1e9, compute_ms, "lfu"
        )
        if case.name == "likely"
    )
    return 1000 / likely.tpot_ms_high, 1000 / likely.tpot_ms_low


TABLES: dict[str, Callable[[Mapping[str, Result]], str]] = {"fits": fits, "speeds": speeds}


def written(text: str, results: Mapping[str, Result]) -> str:
    """README's text with its tables made anew.

    Raises:
        ValueError: it has no place for one of them.
    """
    for name, table in TABLES.items():
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(place.findall(text)) != 1:
            raise ValueError(f"README needs one <!-- table: {name} --> with an <!-- end --> below it")
        made = table(results)
        text = place.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


def main() -> int:
    """Rewrite README, or check it; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where README differs")
    args = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = written(before, newest())
    if not args.check:
        README.write_text(after, encoding="utf-8")
    elif before != after:
        print(
            "README's tables are not those of benchmarks/results: python -m benchmarks.readme_tables", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
