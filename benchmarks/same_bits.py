"""foreroute beside llama.cpp at the same bits, and beside accelerate, on a model larger than the memory that is left.

Once, 53 GB of disk, and 20 more while accelerate runs, which writes all experts once more (make Q8_0 after that):

    python -m benchmarks.make_synthetic --layers 16 --experts 128 --attention-gain 0.6 --out build/synth128
    foreroute pack build/synth128 --quant q4_0 --out build/synth128.q4_0.foreroute
    foreroute pack build/synth128 --quant q8_0 --out build/synth128.q8_0.foreroute
    build/peers/bin/python -m benchmarks.to_gguf build/synth128 build/synth128-q4_0.gguf --experts q4_0
    build/peers/bin/python -m benchmarks.to_gguf build/synth128 build/synth128-q8_0.gguf --experts q8_0

Then, as often as wanted (README.md here says what build/peers is):

    python -m benchmarks.same_bits build/synth128 --peers-python build/peers/bin/python

Each cell is a codec and a share of the experts. foreroute is told to keep that share of them in memory (--memory, in
bytes); a ballast leaves those bytes, the dense weights and --allowance GiB for an interpreter with torch, never less
than 3 GiB; every engine of the cell has the same. What of the allowance llama.cpp does not need is its page cache's.
Each run is a process of its own, cold, fed the same text, so that each routes alike; a round is A-B-B-A.

llama.cpp maps its file, and how much a page fault reads is the disk's read-ahead. It is set to what suits llama.cpp
best (READ_AHEAD_KIB; 32 to 256 were tried), which needs root; once, in the first round, it stays as it is. accelerate
maps all experts and has the memory as page cache: with whole layers resident it ran out of memory while it loaded.

A cell's raw runs are kept as results/<date>-same-bits-CELL.json after every round; the table, results/same-bits.md, is
made of the newest of each cell, so that a cell can be run again by itself (--cells q4_0-25). --lock FILE holds that
file's lock for --turn-rounds rounds at a time, so that several benchmarks of one machine take turns.

The weights are random: routes are nearly even, and nothing here tells the hit rate of a trained model.
"""

import argparse
import contextlib
import fcntl
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from benchmarks import peers
from benchmarks._harness import RESULTS, record, rounded

GIB = 2**30
MIN_LEFT_GIB = 3.0
OURS = "foreroute"
READ_AHEAD_KIB = {"q4_0": 64, "q8_0": 128}  # what llama.cpp was fastest with


@dataclass(frozen=True)
class Cell:
    """One comparison: what runs, and how many experts memory holds.

    name: as --cells has it.
    codec: the one whose expert bytes count for the share; "bf16": as published.
    share: of the experts, 0 to 1.
    engines: names as peers.py takes them, foreroute first.
    once: engines that run one time, for the record.
    """

    name: str
    codec: str
    share: float
    engines: tuple[str, ...]
    once: tuple[str, ...] = ()


def all_cells(model: Path, read_ahead_kib: int | None = None) -> list[Cell]:
    """q4_0 and q8_0 at 25 and 50 %, and accelerate's at 25 % of what was published."""
    base = str(model)
    cells = []
    for codec, gguf_type in (("q4_0", "q4_0"), ("q8_0", "q8_0")):
        llama = f"llama.cpp:gguf={base}-{gguf_type}.gguf"
        kib = read_ahead_kib or READ_AHEAD_KIB[codec]
        engines = (f"{OURS}:packed={base}.{codec}.foreroute", f"{llama}:read_ahead_kib={kib}")
        cells += [Cell(f"{codec}-{percent}", codec, percent / 100, engines, (llama,)) for percent in (25, 50)]
    engines = (f"{OURS}:packed=no", f"{OURS}:packed={base}.q4_0.foreroute", "accelerate:resident_layers=0")
    return [*cells, Cell("accelerate-25", "bf16", 0.25, engines)]


def experts_bytes(model: Path, codec: str) -> int:
    """What all experts take, as that codec stores them."""
    if codec == "bf16":
        return peers.model_facts(model)["all_experts_bytes"]
    return Path(f"{model}.{codec}.foreroute").stat().st_size


def memory_of(cell: Cell, model: Path, allowance: float) -> tuple[float, float]:
    """What experts may take, and what the ballast leaves; both in GiB."""
    facts = peers.model_facts(model)
    memory = cell.share * experts_bytes(model, cell.codec) / GIB
    dense = (facts["checkpoint_bytes"] - facts["all_experts_bytes"]) / GIB
    return memory, max(MIN_LEFT_GIB, memory + dense + allowance)


def missing_files(cell: Cell) -> list[str]:
    """Files that the cell's engines name and that are not there."""
    named = [pair.partition("=")[2] for engine in cell.engines + cell.once for pair in engine.split(":")[1:]]
    return sorted({path for path in named if path.endswith((".foreroute", ".gguf")) and not Path(path).is_file()})


class Turns:
    """Takes a lock file's lock for `rounds` rounds in a row, then lets others have it; without a file: nothing."""

    def __init__(self, path: Path | None, rounds: int) -> None:
        self._path = path
        self._rounds = rounds
        self._done = 0
        self._file: TextIO | None = None

    @contextlib.contextmanager
    def next(self) -> Iterator[None]:
        """A round: what runs inside has the lock."""
        if self._path is not None and self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
            fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._done += 1
            if self._file is not None and self._done % self._rounds == 0:
                self._file.close()
                self._file = None


def run_cell(cell: Cell, args: argparse.Namespace, turns: Turns) -> None:
    """All rounds of a cell; what there is, is kept after each of them."""
    memory, left = memory_of(cell, args.model, args.allowance)
    setting = {"memory": memory, "left": left, "feed": "text", "cold": True, "gguf": None}
    given = argparse.Namespace(**{**vars(args), **setting})
    store = Path(f"{args.model}.{'q4_0' if cell.codec == 'bf16' else cell.codec}.foreroute")
    rates: list[float | None] = []
    runs: list[peers.Run] = []
    for number in range(args.rounds):
        with turns.next():
            rates.append(peers.direct_read_rate(store))
            for engine in (*cell.engines, *reversed(cell.engines), *(() if number else cell.once)):
                run = peers.run_engine(engine, True, given)
                runs.append({**run, "round": number})
                said = run.get("error") or f"{1 / run['tpot_s']:.2f} tokens/s, {run['ttft_s']:.1f} s to the first"
                print(f"{cell.name} {short(engine)}: {said}", file=sys.stderr, flush=True)
            keep(cell, memory, left, rates, runs, args)


def keep(
    cell: Cell, memory: float, left: float, rates: list[float | None], runs: list[peers.Run], args: argparse.Namespace
) -> None:
    """Print what the cell says so far, and record it unless it is a trial."""
    result = {
        "cell": cell.name,
        "share": cell.share,
        "memory_gib": memory,
        "left_gib": left,
        "options": {name: getattr(args, name) for name in ("allowance", "new_tokens", "prompt_tokens", "threads")},
        "read_ahead_kib": int(peers.read_ahead_file(args.model).read_text(encoding="utf-8")),
        "model": peers.model_facts(args.model),
        "experts_bytes": experts_bytes(args.model, cell.codec),
        "direct_read_bytes_per_s": median([rate for rate in rates if rate] or [0]),
        "rows": summaries(runs),
    }
    raw = [{**run, "engine": short(run["engine"])} for run in runs]  # no folder of this machine is kept
    record(f"same-bits-{cell.name}", rounded(result), raw={"runs": rounded(raw, 5)}, keep=not args.trial)


def short(engine: str) -> str:
    """An engine's name without folders."""
    name, *pairs = engine.split(":")
    return ":".join([name, *(f"{key}={Path(value).name}" for key, value in (pair.split("=") for pair in pairs))])


def summaries(runs: list[peers.Run]) -> list[peers.Run]:
    """One row per engine: medians of its runs, and how foreroute (the first row) compares."""
    by_engine: dict[str, list[peers.Run]] = {}
    for run in runs:
        by_engine.setdefault(run["engine"], []).append(run)
    reference = next((run["tokens"] for run in runs if "tokens" in run), None)
    rows = [{**peers.summarize(group, reference), "engine": short(engine)} for engine, group in by_engine.items()]
    for row in rows:
        if "ms_per_token" in row:
            row["tokens_per_s"] = 1e3 / row["ms_per_token"]["median"]
            if "tokens_per_s" in rows[0]:
                row["foreroute_is_times_faster"] = rows[0]["tokens_per_s"] / row["tokens_per_s"]
    return rows


def newest_results(cells: list[Cell]) -> list[dict[str, Any]]:
    """The newest kept result of each cell that has one."""
    found = []
    for cell in cells:
        paths = sorted(RESULTS.glob(f"*-same-bits-{cell.name}.json"))
        found += [json.loads(paths[-1].read_text(encoding="utf-8"))] if paths else []
    return found


def table(results: list[dict[str, Any]]) -> str:
    """All cells in Markdown."""
    heads = ("cell", "memory left", "for experts", "engine", "tokens/s", "ms/token (min-max)", "runs", "MB read/token")
    heads += ("CPU ms/token", "reads alone, ms", "peak RSS GiB", "no file's", "load s", "TTFT s", "same choices")
    heads += ("foreroute is",)
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for result in results:
        for row in result["rows"]:
            cells = [result["cell"], f"{result['left_gib']:.2f} GiB", f"{result['memory_gib']:.2f} GiB", row["engine"]]
            lines.append("| " + " | ".join(cells + figures(row, result["direct_read_bytes_per_s"])) + " |")
    return "\n".join(lines)


def figures(row: dict[str, Any], rate: float) -> list[str]:
    """The cells of one engine's row, after its name; `rate` is the disk's, in bytes per second."""
    if "ms_per_token" not in row:
        return [row["errors"][0]]
    speed, read = row["ms_per_token"], row["read_bytes_per_token"]
    return [
        f"**{row['tokens_per_s']:.2f}**",
        f"{speed['median']:.0f} ({speed['min']:.0f}-{speed['max']:.0f})",
        f"{row['runs']}" + (f", {len(row['errors'])} failed" if "errors" in row else ""),
        f"{read / 1e6:.0f}",
        f"{1e3 * row['cpu_s_per_token']:.0f}",
        f"{1e3 * read / rate:.0f}" if rate else "",
        f"{row['peak_rss_bytes'] / GIB:.2f}",
        f"{row['own_bytes'] / GIB:.2f}",
        f"{row['load_s']:.1f}",
        f"{row['ttft_s']['median']:.1f}",
        f"{100 * row['same_tokens']:.0f} %",
        f"{row['foreroute_is_times_faster']:.2f} x as fast" if "foreroute_is_times_faster" in row else "",
    ]


def notes(results: list[dict[str, Any]]) -> str:
    """What the table's figures depend on."""
    lines = []
    for result in results:
        facts, options = result["model"], result["options"]
        lines.append(
            f"- {result['cell']}: {result['date'][:10]}, commit {result['commit']}; {facts['layers']} layers x "
            f"{facts['experts_per_layer']} experts, {result['experts_bytes'] / 1e9:.2f} GB of them; prompt "
            f"{options['prompt_tokens']} tokens, {options['new_tokens']} decoded (fed text), batch 1, "
            f"{options['threads']} threads; disk {result['direct_read_bytes_per_s'] / 1e9:.2f} GB/s by O_DIRECT, one "
            f"thread; read-ahead {result['read_ahead_kib']} KiB where an engine names none."
        )
    lines.append("- Same choices: share of the tokens that the cell's first engine would have chosen too.")
    lines.append("- Random weights: mechanics only.")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    """Options; the defaults make the published table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="build/synth128; stores and GGUF files lie beside it")
    parser.add_argument("--cells", help="names with commas between, e.g. q4_0-25,q8_0-50; all when left out")
    parser.add_argument("--rounds", type=int, default=3, help="each runs every engine twice, forwards and backwards")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--allowance", type=float, default=0.75, help="GiB beside experts and dense weights")
    parser.add_argument("--read-ahead-kib", type=int, help="of the disk while llama.cpp runs, for all cells")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter with the peers installed")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one run")
    parser.add_argument("--scratch", type=Path, help="for accelerate's offload folder; beside the model by default")
    parser.add_argument("--lock", type=Path, help="take turns with others: its lock is held while engines run")
    parser.add_argument("--turn-rounds", type=int, default=1, help="rounds that a turn takes")
    parser.add_argument("--trial", action="store_true", help="print the figures, keep nothing under results/")
    args = parser.parse_args()
    args.model = args.model.resolve()
    args.scratch = (args.scratch or args.model.parent).resolve()
    return args


def main() -> None:
    """Run the cells, then write the table."""
    args = parse_args()
    cells = all_cells(args.model, args.read_ahead_kib)
    wanted = args.cells.split(",") if args.cells else [cell.name for cell in cells]
    if unknown := set(wanted) - {cell.name for cell in cells}:
        sys.exit(f"No cell is called {', '.join(unknown)}. There are {', '.join(cell.name for cell in cells)}.")
    chosen = [cell for cell in cells if cell.name in wanted]
    if missing := sorted({path for cell in chosen for path in missing_files(cell)}):
        sys.exit(f"Not there: {', '.join(missing)}. The top of benchmarks/same_bits.py says how they are made.")
    turns = Turns(args.lock, args.turn_rounds)
    for cell in chosen:
        run_cell(cell, args, turns)
    if not args.trial:
        results = newest_results(cells)
        markdown = f"{table(results)}\n\n{notes(results)}\n"
        (RESULTS / "same-bits.md").write_text(markdown, encoding="utf-8")
        print(markdown, file=sys.stderr)


if __name__ == "__main__":
    main()
