"""foreroute beside other engines, on one checkpoint, with the same memory left to each.

    python -m benchmarks.make_synthetic --out build/synth           # once
    python -m benchmarks.to_gguf build/synth build/synth-f16.gguf    # once, for llama.cpp
    python -m benchmarks.peers build/synth --gguf build/synth-f16.gguf

Each run is a process of its own, started when a ballast (ballast.py) has left so much memory free and the page cache
holds nothing of the model. Engines take turns, forwards and backwards (A-B-B-A). Beside them, without a ballast, run
the engines with every weight in memory: the ceiling. The disk's own rate is measured in the same run. What a part of
foreroute is worth is seen by naming it without: --limited foreroute,foreroute:prefetch=none,foreroute:cache=False.

An engine's options follow its name: foreroute's are the fields of EngineConfig (packed=build/synth.q4_k.foreroute),
llama.cpp's are the file (gguf=PATH in place of --gguf), mmap=False, and repack=True, which lets it rewrite weights for
this CPU in memory of its own. read_ahead_kib=128 sets the disk's read-ahead while that engine runs, and needs root: a
mapped file is read in pieces of about that size, so it decides how many bytes llama.cpp reads. Quantised experts, with
memory for a share of them, are compared by same_bits.py, which uses what is here.

Greedy decoding by default. With --feed text every engine is fed the same tokens of an English text, so that each routes
the same way, and the choices that each would have made can be compared.
"""

import argparse
import contextlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._harness import RESULTS, record, rounded, summary
from benchmarks.ballast import Ballast, BallastError, available_bytes
from foreroute.memory.host import usable_cpus

LIMITED = ("foreroute", "accelerate", "accelerate:resident_layers=0", "llama.cpp")
UNLIMITED = ("foreroute", "transformers", "transformers-eager", "llama.cpp")
TEXT = (
    "The road goes over the hill and down to the river, where a ferry takes whoever comes. Nobody knows how old the "
    "ferry is. It leaves when it is full, or when the ferryman has had enough of waiting, and it has never been known "
    "to turn back for a hat. On the other side the road goes on, through a wood of oaks that were planted for ships "
    "that nobody built, past an inn with two doors, and out to the sea. Travellers who ask the way are told to follow "
    "the road, for there is only one, and those who ask how far it is are told that it depends on their shoes."
)

Run = dict[str, Any]


def tokens_of_text(model: Path, count: int) -> list[int]:
    """The first `count` tokens of TEXT, repeated if it is too short, by the checkpoint's own tokenizer."""
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT).ids
    return (ids * (count // len(ids) + 1))[:count]


def drop_from_page_cache(paths: list[Path]) -> None:
    """Make the kernel forget these files, without the right to drop all caches; other files stay."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def direct_read_rate(path: Path, nbytes: int = 2**30, block_bytes: int = 8 * 2**20) -> float | None:
    """Bytes per second of one thread reading past the page cache: the ceiling; None where O_DIRECT is refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:
        buffer = mmap.mmap(-1, block_bytes)
        done, start = 0, time.perf_counter()
        while done < nbytes and (got := os.preadv(descriptor, [buffer], done)) == block_bytes:
            done += got
        return done / (time.perf_counter() - start)
    finally:
        os.close(descriptor)


def model_facts(model: Path) -> dict[str, int]:
    """What one token needs and what all experts take, in bytes of bf16."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    expert = 3 * config["hidden_size"] * config["moe_intermediate_size"] * 2
    experts = config.get("num_experts") or config["num_local_experts"]
    layers = config["num_hidden_layers"]
    return {
        "layers": layers,
        "experts_per_layer": experts,
        "expert_bytes": expert,
        "all_experts_bytes": layers * experts * expert,
        "token_demand_bytes": layers * config["num_experts_per_tok"] * expert,
        "checkpoint_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
    }


def options_of(engine: str) -> dict[str, Any]:
    """The options in a name such as foreroute:prefetch=none:hits_first=False; paths become absolute."""
    options: dict[str, Any] = {}
    for pair in engine.split(":")[1:]:
        name, _, text = pair.partition("=")
        is_file = name in ("packed", "gguf") and Path(text).is_file()
        value: Any = str(Path(text).resolve()) if is_file else int(text) if text.isdigit() else text
        options[name] = {"True": True, "False": False}.get(text, value)
    return options


def read_ahead_file(path: Path) -> Path:
    """Where the kernel keeps the read-ahead of the disk that holds `path`, in KiB."""
    device = path.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    queue = block if (block / "queue").exists() else block.parent  # a partition has its disk's
    return queue / "queue" / "read_ahead_kb"


@contextlib.contextmanager
def read_ahead(path: Path, kib: int | None) -> Iterator[None]:
    """Set the read-ahead of the disk that holds `path` for what runs inside, then put it back. None: leave it.

    Raises:
        OSError: only root may.
    """
    if kib is None:
        yield
        return
    setting = read_ahead_file(path)
    before = setting.read_text(encoding="utf-8")
    setting.write_text(str(kib), encoding="utf-8")
    try:
        yield
    finally:
        setting.write_text(before, encoding="utf-8")


def run_engine(engine: str, limited: bool, args: argparse.Namespace) -> Run:
    """One run of one engine in its own process; a failure is a result that says what failed."""
    text = tokens_of_text(args.model, args.prompt_tokens + args.new_tokens)
    facts: Run = {"engine": engine, "limited": limited}
    name, options = engine.split(":")[0], options_of(engine)
    model = Path(options.pop("gguf", args.gguf)) if name == "llama.cpp" else args.model
    kib = options.pop("read_ahead_kib", None)
    if args.cold:
        files = [*args.model.glob("*.safetensors"), model, Path(options.get("packed", "no"))]
        drop_from_page_cache([path for path in files if path.is_file()])
    try:
        with (
            read_ahead(model, kib),
            tempfile.TemporaryDirectory(prefix="scratch-", dir=args.scratch) as scratch,
            Ballast(int(args.left * 2**30)) if limited else contextlib.nullcontext(),
        ):
            facts["available_bytes"] = available_bytes()
            job = {
                "engine": name,
                "options": options,
                "model": str(model),
                "memory": int(args.memory * 2**30) if limited else None,
                "prompt": text[: args.prompt_tokens],
                "feed": text[args.prompt_tokens :] if args.feed == "text" else [],
                "new_tokens": args.new_tokens,
                "threads": args.threads,
                "scratch": scratch,
            }
            return {**facts, **run_job(job, args)}
    except subprocess.TimeoutExpired:
        return {**facts, "error": f"no end after {args.timeout} s"}
    except BallastError as error:
        return {**facts, "error": str(error)}


def run_job(job: dict[str, Any], args: argparse.Namespace) -> Run:
    """Start the runner, hand it the job, read its answer; or the last line of what went wrong."""
    done = subprocess.run(
        [
            sys.executable if job["engine"].startswith("foreroute") else args.peers_python,
            "-m",
            "benchmarks.peer_runner",
        ],
        cwd=RESULTS.parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(("src", "."))},
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=args.timeout,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        return {"error": f"exit {done.returncode}: {last[:300]}".replace(str(args.model.parent), "")}
    answer: Run = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def summarize(runs: list[Run], reference: list[int] | None) -> Run:
    """Several runs of one engine as one: medians, and the spread of what matters."""
    good = [run for run in runs if "error" not in run]
    facts: Run = {"engine": runs[0]["engine"], "limited": runs[0]["limited"], "runs": len(good)}
    if errors := [run["error"] for run in runs if "error" in run]:
        facts["errors"] = errors
    if not good:
        return facts
    facts["ms_per_token"] = summary([1000 * run["tpot_s"] for run in good])
    facts["token_ms_p50"] = median(1000 * second for run in good for second in run["token_s"])
    facts["ttft_s"] = summary([run["ttft_s"] for run in good])
    for name in (
        "load_s",
        "available_bytes",
        "read_bytes_per_token",
        "disk_bytes_per_token",
        "cpu_s_per_token",
        "major_faults_per_token",
        "peak_rss_bytes",
        "own_bytes",
    ):
        facts[name] = median(run[name] for run in good)
    if reference is not None:
        facts["same_tokens"] = median(
            sum(a == b for a, b in zip(run["tokens"], reference, strict=True)) / len(reference) for run in good
        )
    return facts


def table(rows: list[Run]) -> str:
    """The summary in Markdown."""
    heads: tuple[str, ...] = (
        "engine",
        "memory left",
        "ms/token",
        "(min-max)",
        "p50",
        "TTFT s",
        "MB read/token",
        "of the disk",
    )
    heads += ("peak RSS GiB", "no file's", "load s", "same tokens")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        left = f"{row['available_bytes'] / 2**30:.1f} GiB" if "available_bytes" in row else "?"
        failed = f" ({len(row['errors'])} runs failed)" if "errors" in row else ""
        cells = [row["engine"] + failed, left + ("" if row["limited"] else " (no limit)")]
        if "ms_per_token" in row:
            speed, same = row["ms_per_token"], row.get("same_tokens")
            cells += [
                f"**{speed['median']:.0f}**",
                f"{speed['min']:.0f}-{speed['max']:.0f}",
                f"{row['token_ms_p50']:.0f}",
            ]
            cells += [f"{row['ttft_s']['median']:.2f}"]
            cells += [f"{row[name] / 1e6:.0f}" for name in ("read_bytes_per_token", "disk_bytes_per_token")]
            cells += [f"{row[name] / 2**30:.2f}" for name in ("peak_rss_bytes", "own_bytes")]
            cells += [f"{row['load_s']:.1f}", "" if same is None else f"{100 * same:.0f} %"]
        else:
            cells += [row["errors"][0]] + [""] * (len(heads) - 3)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(runs: list[Run], rate: float | None, args: argparse.Namespace) -> None:
    """Print the table and the JSON, the JSON last; unless it is a trial, keep both."""
    groups: dict[tuple[str, bool], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["engine"], run["limited"]), []).append(run)
    tellers = [run for run in runs if run["engine"] == "transformers-eager" and "tokens" in run]
    reference = tellers[0]["tokens"] if tellers else None
    rows = [summarize(group, reference) for group in groups.values()]
    facts = model_facts(args.model)
    disk = "O_DIRECT is refused there" if rate is None else f"{rate / 1e9:.2f} GB/s by O_DIRECT, one thread, this run"
    notes = [
        f"{args.model.name}: {facts['checkpoint_bytes'] / 1e9:.2f} GB, {facts['layers']} layers x "
        f"{facts['experts_per_layer']} experts of {facts['expert_bytes'] / 1e6:.1f} MB; one token routes to "
        f"{facts['token_demand_bytes'] / 1e6:.0f} MB.",
        f"Prompt {args.prompt_tokens} tokens, {args.new_tokens} decoded ({args.feed}), batch 1, "
        f"{args.threads} threads; {args.memory:.2f} GiB for experts where an engine takes a budget; page cache "
        f"{'dropped for the model before each run' if args.cold else 'left as the last run left it'}.",
        f"Disk: {disk}. Order A-B-B-A x {args.rounds}. Same tokens: share equal to those of transformers-eager.",
    ]
    markdown = table(rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"
    print(markdown)
    options = {name: getattr(args, name) for name in ("left", "memory", "new_tokens", "prompt_tokens", "feed", "cold")}
    result = {"options": {**options, "threads": args.threads}, "model": facts, "direct_read_bytes_per_s": rate}
    if args.trial:
        print(json.dumps(rounded({**result, "rows": rows, "runs": runs})))
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "peers.md").write_text(markdown, encoding="utf-8")
    record("peers", rounded({**result, "rows": rows}), raw={"runs": rounded(runs, 5)})


def parse_args() -> argparse.Namespace:
    """Options; the defaults make the published table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="a checkpoint of make_synthetic.py")
    parser.add_argument("--gguf", type=Path, help="the same weights by to_gguf.py; without it llama.cpp is left out")
    parser.add_argument("--left", type=float, default=3.0, help="GiB that the ballast leaves, 3 or more")
    parser.add_argument(
        "--memory", type=float, default=1.5, help="GiB of it for experts, where an engine takes a budget"
    )
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--feed", choices=("greedy", "text"), default="greedy")
    parser.add_argument("--rounds", type=int, default=2, help="each runs every engine twice, forwards and backwards")
    parser.add_argument("--warm", dest="cold", action="store_false", help="leave the page cache as it is")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--limited", default=",".join(LIMITED), help="engines to run under the ballast")
    parser.add_argument("--unlimited", default=",".join(UNLIMITED), help="engines to run without it")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter with the peers installed")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one run")
    parser.add_argument("--scratch", type=Path, help="for accelerate's offload folder; beside the model by default")
    parser.add_argument("--trial", action="store_true", help="print the figures, keep nothing under results/")
    args = parser.parse_args()
    args.model = args.model.resolve()
    args.gguf = args.gguf.resolve() if args.gguf else None
    args.scratch = (args.scratch or args.model.parent).resolve()
    return args


def main() -> None:
    """Run everything and report."""
    args = parse_args()
    wanted = [(name, True) for name in args.limited.split(",") if name]
    wanted += [(name, False) for name in args.unlimited.split(",") if name]
    has_file = args.gguf or "gguf=" in args.limited + args.unlimited
    wanted = [(name, limited) for name, limited in wanted if name.split(":")[0] != "llama.cpp" or has_file]
    rate = direct_read_rate(min(args.model.glob("*.safetensors")))
    runs: list[Run] = []
    for _ in range(args.rounds):
        for name, limited in wanted + wanted[::-1]:
            run = run_engine(name, limited, args)
            said = run.get("error") or f"{1000 * run['tpot_s']:.0f} ms/token, {run['ttft_s']:.1f} s to the first"
            print(f"{name}{' (limited)' if limited else ''}: {said}", file=sys.stderr, flush=True)
            runs.append(run)
    report(runs, rate, args)


if __name__ == "__main__":
    main()
