"""foreroute beside llama.cpp on the same GGUF file, at the shapes of published models (published_files.py writes them).

    python -m benchmarks.published build/qwen3-q4_k_m.gguf --llama-python .venv-llama/bin/python
    python -m benchmarks.published build/qwen3-q4_k_m.gguf --llama-python ... --share 25% --left 7.5
    python -m benchmarks.published build/qwen3-q4_k_m.gguf --llama-python ... --prompt-tokens 512 --new-tokens 4

Engines take turns, A-B-B-A, each run in a process of its own: foreroute straight from the file, and with --packed from
a store; llama.cpp with its weights mapped, and as it comes, when it copies what it can into a quicker layout. Without
--left everything is resident and the file in the page cache. With it a ballast leaves those GiB to each, the file is
dropped from the page cache, and llama.cpp's read-ahead is set as --read-ahead says (needs root), as it decides how much
a mapped file reads. Weights are random, and routes change from token to token as published_files.py sets it.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks._harness import RESULTS, record, rounded, summary
from benchmarks.ballast import Ballast, BallastError
from benchmarks.peers import direct_read_rate, drop_from_page_cache, read_ahead, run_job
from foreroute.memory.host import usable_cpus

VOCABULARY = 8000
# Enough tokens to route to every expert of a layer.
WARM_UP_TOKENS = 512
Run = dict[str, Any]


def memory_rate(nbytes: int = 2**30) -> float:
    """Bytes per second at which all cores read memory: the ceiling of decoding."""
    block = torch.ones(nbytes // 8, dtype=torch.int64)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        block.sum()
        best = max(best, nbytes / (time.perf_counter() - started))
    return best


def contenders(args: argparse.Namespace) -> list[str]:
    """Names of engines with their options."""
    named = ["foreroute"]
    if args.packed is not None:
        named.append(f"foreroute:packed={args.packed.resolve()}")
    if args.llama_python:
        named += ["llama.cpp", "llama.cpp:repack=True"]
    return named


def run(engine: str, args: argparse.Namespace) -> Run:
    """One run of one engine; a failure is a result that says what failed."""
    name, _, text = engine.partition(":")
    option, _, value = text.partition("=")
    options: dict[str, Any] = {option: True if value == "True" else value} if option else {}
    is_limited = args.left is not None
    if is_limited:
        drop_from_page_cache([path for path in (args.file, args.packed) if path is not None])
    job = {
        "engine": "foreroute-gguf" if name == "foreroute" else name,
        "options": options,
        "model": str(args.file),
        "memory": args.share if is_limited else None,
        "prompt": np.random.default_rng(3).integers(100, VOCABULARY, args.prompt_tokens).tolist(),
        "feed": np.random.default_rng(4).integers(100, VOCABULARY, args.new_tokens).tolist(),
        "new_tokens": args.new_tokens,
        "threads": args.threads,
        "warm_up": [] if is_limited else np.random.default_rng(5).integers(100, VOCABULARY, WARM_UP_TOKENS).tolist(),
        "scratch": "",
    }
    kib = args.read_ahead if is_limited and name == "llama.cpp" else None
    try:
        with (
            read_ahead(args.file, kib),
            Ballast(int(args.left * 2**30)) if is_limited else contextlib.nullcontext(),
        ):
            return {"engine": engine, **run_job(job, args)}
    except (BallastError, subprocess.TimeoutExpired) as error:
        return {"engine": engine, "error": str(error)[:200]}


def summarize(runs: list[Run]) -> Run:
    """Several runs of one engine as one."""
    good = [one for one in runs if "error" not in one]
    facts: Run = {
        "engine": runs[0]["engine"],
        "runs": len(good),
        "errors": [one["error"] for one in runs if "error" in one],
    }
    if good:
        facts["ms_per_token"] = summary([1000 * one["tpot_s"] for one in good])
        facts["token_ms_p50"] = median(1000 * second for one in good for second in one["token_s"])
        facts["prompt_s"] = summary([one["ttft_s"] for one in good])
        for name in ("load_s", "read_bytes_per_token", "peak_rss_bytes", "own_bytes"):
            facts[name] = median(one[name] for one in good)
        reads = [one["stats"] for one in good if one.get("stats", {}).get("read_s")]
        if reads:
            # By the engine's own clock, prompt included: what the disk gave while it was read.
            facts["read_bytes_per_s"] = median(one["read_bytes"] / one["read_s"] for one in reads)
    return facts


def table(rows: list[Run], prompt_tokens: int) -> str:
    """The summary in Markdown."""
    lines = [
        "| engine | ms/token | min-max | p50 | prompt tokens/s | MB read/token | ready s | peak GiB | own GiB |",
        "|---|" + "---|" * 8,
    ]
    for row in rows:
        if "ms_per_token" not in row:
            lines.append(f"| {row['engine']} | {row['errors'][0]} | | | | | | | |")
            continue
        speed = row["ms_per_token"]
        cells = [
            row["engine"],
            f"**{speed['median']:.1f}**",
            f"{speed['min']:.1f}-{speed['max']:.1f}",
            f"{row['token_ms_p50']:.1f}",
        ]
        cells += [
            f"{prompt_tokens / row['prompt_s']['median']:.1f}",
            f"{row['read_bytes_per_token'] / 1e6:.0f}",
            f"{row['load_s']:.1f}",
        ]
        cells += [f"{row[name] / 2**30:.2f}" for name in ("peak_rss_bytes", "own_bytes")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="a GGUF file of published_files.py")
    parser.add_argument("--packed", type=Path, help="a store of foreroute pack, measured too")
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python; without it foreroute runs alone")
    parser.add_argument(
        "--left", type=float, help="GiB that a ballast leaves to each engine; without it all is resident"
    )
    parser.add_argument("--share", default="50%", help="foreroute's memory for experts, with --left")
    parser.add_argument("--read-ahead", type=int, default=128, help="KiB, for llama.cpp with --left")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1, help="each runs every engine twice, forwards and backwards")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one run")
    parser.add_argument("--only", help="one of the engines, for a trial")
    parser.add_argument("--trial", action="store_true", help="keep nothing under results/")
    args = parser.parse_args()
    args.file, args.model, args.peers_python = args.file.resolve(), args.file.resolve(), args.llama_python
    return args


def main() -> None:
    """Run everything and report."""
    args = parse_args()
    named = [one for one in contenders(args) if args.only in (None, one)]
    ceiling = {"memory_bytes_per_s": memory_rate(), "direct_read_bytes_per_s": direct_read_rate(args.file)}
    runs: list[Run] = []
    for _ in range(args.rounds):
        for engine in named + named[::-1]:
            done = run(engine, args)
            said = done.get("error") or f"{1000 * done['tpot_s']:.1f} ms/token, {done['ttft_s']:.2f} s to the first"
            print(f"{engine}: {said}", file=sys.stderr, flush=True)
            runs.append(done)
    rows = [summarize([one for one in runs if one["engine"] == engine]) for engine in named]
    print(table(rows, args.prompt_tokens) + "\n")
    options = {
        name: getattr(args, name) for name in ("left", "share", "read_ahead", "prompt_tokens", "new_tokens", "threads")
    }
    result = {"file": args.file.name, "options": options, **ceiling, "rows": rows}
    name = (
        f"published-{args.file.stem}-{'resident' if args.left is None else args.share.rstrip('%')}-{args.prompt_tokens}"
    )
    assert RESULTS.parent.is_dir(), "run it from the checkout"
    record(name, rounded(json.loads(json.dumps(result))), raw={"runs": rounded(runs, 5)}, keep=not args.trial)


if __name__ == "__main__":
    main()
