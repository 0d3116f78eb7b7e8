"""What each policy costs: `foreroute eval --policies` on a trained model, with no cache and with caches.

    python -m benchmarks.policies models/foreroute-tiny [--memory none 25% 50%] [--windows 28] [--per-kind 50]

Held-out text (`make held-out`) is cut in two: predictors are fitted to the first half of every source, and policies are
priced on the second, on text that neither the models nor the predictors were trained on; by logical time, in fp32. With
a cache, what exact decoding moves under LRU without guesses stands beside the rows.
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import foreroute  # before torch, which then spins less (foreroute/__init__.py)

# isort: split
import torch

from benchmarks import _harness
from benchmarks.predictors import halves
from foreroute import EngineConfig
from foreroute.checkpoint.locate import read_index
from foreroute.cli.commands.evaluate import default_held_out
from foreroute.cli.main import main as foreroute_command
from foreroute.evals.text import HeldOut, read_held_out
from foreroute.model.text import load_tokenizer
from foreroute.prepare.corpus import read_corpus
from foreroute.prepare.fit import fit

POLICIES = ("exact", "tolerance:0.05", "tolerance:0.1", "tolerance:0.2", "tolerance:0.3", "speculative", "paper")

SHOWN = ("policy", "tau", "memory", "delta_nats", "kl", "agreement", "stalled_layers", "waited_misses",
         "bytes_beside_lru", "accuracy_mean")  # fmt: skip


def evaluate(*flags: object) -> list[dict[str, Any]]:
    """Run `foreroute eval --json`; its rows."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = foreroute_command(["eval", *map(str, flags), "--json"])
    if code:
        raise SystemExit(code)
    rows: list[dict[str, Any]] = json.loads(out.getvalue())
    return rows


def prepare(model: Path, held_out_file: Path, tokens: int, scratch: Path) -> tuple[Path, Path]:
    """Predictors fitted to the first halves, and a file of held-out text with the second."""
    held_out = read_held_out(held_out_file)
    first, second = halves(held_out_file, scratch)
    loaded = foreroute.load(model, "100%", dtype="float32", config=EngineConfig(prefetch="none"))
    corpus = read_corpus(load_tokenizer(model), first, tokens, 512)
    fit(loaded, read_index(model).fingerprint(), corpus, scratch / "sidecar.safetensors")
    loaded.foreroute.close()
    texts = {path.name.split(".")[0]: path.read_text(encoding="utf-8") for path in second}
    HeldOut(texts, {name: held_out.shares[name] for name in texts}, held_out.glossary).write(scratch / "second.json")
    return scratch / "sidecar.safetensors", scratch / "second.json"


def main() -> None:
    """Price, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--memory", nargs="+", default=["none", "25%", "50%"])
    parser.add_argument("--windows", type=int, default=28)
    parser.add_argument("--per-kind", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=65536, help="fitted to")
    parser.add_argument("--held-out", type=Path, default=default_held_out())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    name = f"policies-{asked.model.name}-{'-'.join(memory.strip('%') for memory in asked.memory)}"
    with tempfile.TemporaryDirectory() as folder:
        sidecar, second = prepare(asked.model, asked.held_out, asked.tokens, Path(folder))
        common = (
            asked.model, "--suite", "builtin", "--held-out", second, "--predictor", sidecar, "--dtype", "float32",
            "--threads", asked.threads, "--deterministic", "--windows", asked.windows,
        )  # fmt: skip
        picture = Path(__file__).parent / "results" / f"{name}.png"
        rows = evaluate(*common, "--per-kind", asked.per_kind, "--policies", *asked.policies, "--memory", *asked.memory,
                        "--png", picture)  # fmt: skip
        budgets = [memory for memory in asked.memory if memory != "none"]
        plain = []
        if budgets:
            plain = evaluate(*common, "--per-kind", 0, "--policies", "exact", "--memory", *budgets, "--eviction", "lru",
                             "--prefetch", "none")  # fmt: skip
    moved = {row["memory"]: row["bytes_per_token"] for row in plain}
    for row in rows:
        if row["memory"] in moved:
            row["bytes_beside_lru"] = row["bytes_per_token"] / moved[row["memory"]]
        shares = row["accuracy"].values()
        row["accuracy_mean"] = sum(shares) / len(shares) if shares else None
        print({key: row.get(key) for key in SHOWN}, flush=True)
    result = {"model": asked.model.name, "fitted_to": asked.tokens, "rows": rows, "lru_without_prefetch": plain}
    _harness.record(name, _harness.rounded(result, 6), {})


if __name__ == "__main__":
    main()
