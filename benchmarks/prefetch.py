"""What guesses are worth in exact mode: misses, late hits, and the bytes they cost.

    python -m benchmarks.prefetch models/foreroute-tiny [--memory 25% 50%] [--prompts 24] [--new-tokens 64]

For every budget and eviction rule the same prompts (held-out text) are continued greedily without guesses, with the
lookahead and with fitted predictors (fitted to the other half of the held-out text). A *miss* is a demanded expert
whose load had not been issued when the router asked; a *late hit*'s load was in flight. Tokens must be
equal, or the benchmark fails. Whether a hit is late depends on the disk and on who else uses the machine; misses
and bytes hardly do.
"""

import argparse
import sys
import tempfile
import time
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
from foreroute.model.text import load_tokenizer
from foreroute.prepare.corpus import read_corpus
from foreroute.prepare.fit import fit

KINDS = ("none", "lookahead", "fitted")


def prompts_of(folder: Path, files: list[Path], count: int, length: int) -> torch.Tensor:
    """[count, length] token ids, spread over the text."""
    return read_corpus(load_tokenizer(folder), files, count * length, length).windows[:count]


def fitted_to(folder: Path, files: list[Path], tokens: int, path: Path) -> Path:
    """A sidecar of the model, outside its folder."""
    model = foreroute.load(folder, "100%", config=EngineConfig(prefetch="none"))
    corpus = read_corpus(load_tokenizer(folder), files, tokens, 512)
    fit(model, read_index(folder).fingerprint(), corpus, path)
    model.foreroute.close()
    return path


def config_of(kind: str, eviction: str, sidecar: Path) -> EngineConfig:
    """The engine's switches for one contender."""
    if kind == "none":
        return EngineConfig(prefetch="none", eviction=eviction)
    predictor = str(sidecar) if kind == "fitted" else "no"
    # Decode alone is counted: bytes prefetched in prefill would not show. Governed, some steps would have no guesses.
    return EngineConfig(predictor=predictor, eviction=eviction, prefetch_prefill="off", governor=False)


def decode(model: Any, prompts: torch.Tensor, new_tokens: int) -> tuple[dict[str, float], list[list[int]]]:
    """Continue every prompt, the first one to warm up; per decoded token what the others took, and all tokens."""
    tokens, before, started = [], model.foreroute.stats(), 0.0
    for number, prompt in enumerate(prompts):
        if number == 1:
            before, started = model.foreroute.stats(), time.perf_counter()
        out = model.generate(
            prompt[None], max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        tokens.append(out[0, prompts.shape[1] :].tolist())
    seconds = time.perf_counter() - started
    stats = model.foreroute.stats().minus(before)
    phase = stats.decode
    return {
        "misses": phase.misses / phase.tokens,
        "late_hits": phase.late_hits / phase.tokens,
        "hits": phase.hits / phase.tokens,
        "demand_mb": phase.demand_bytes / phase.tokens / 1e6,
        "prefetch_mb": phase.prefetch_bytes / phase.tokens / 1e6,
        "stall_ms": 1e3 * phase.stall_s / phase.tokens,
        "ms_with_prefill": 1e3 * seconds / phase.tokens,
    }, tokens


def main() -> None:
    """Measure all budgets and evictions, and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", nargs="+", default=["25%", "50%"])
    parser.add_argument("--eviction", nargs="+", default=["lfu", "lru"])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=65536, help="to fit to")
    parser.add_argument("--held-out", type=Path, default=default_held_out())
    asked = parser.parse_args()
    if asked.prompts < 2:
        parser.error("--prompts must be at least 2: the first one warms up")
    found: dict[str, Any] = {}
    different: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        files = halves(asked.held_out, Path(name))
        sidecar = fitted_to(asked.model, files[0], asked.tokens, Path(name) / "fit")
        prompts = prompts_of(asked.model, files[1], asked.prompts, asked.prompt_tokens)
        for memory in asked.memory:
            for eviction in asked.eviction:
                runs, tokens = {}, {}
                for kind in KINDS:
                    model = foreroute.load(asked.model, memory, config=config_of(kind, eviction, sidecar))
                    runs[kind], tokens[kind] = decode(model, prompts, asked.new_tokens)
                    model.foreroute.close()
                different += [f"{memory} {eviction} {kind}" for kind in KINDS if tokens[kind] != tokens["none"]]
                base = runs["none"]
                for entry in runs.values():
                    entry["misses_less_share"] = 1 - entry["misses"] / base["misses"] if base["misses"] else 0.0
                    read_mb = entry["demand_mb"] + entry["prefetch_mb"]
                    entry["more_bytes_share"] = read_mb / base["demand_mb"] - 1 if base["demand_mb"] else 0.0
                    print(memory, eviction, {key: round(value, 3) for key, value in entry.items()}, flush=True)
                found[f"{memory} {eviction}"] = runs
    result = {"model": asked.model.name, "same_tokens": not different, "runs": found}
    _harness.record(f"prefetch-{asked.model.name}", _harness.rounded(result, 4))
    if different:
        sys.exit(f"tokens differ: {different}")


if __name__ == "__main__":
    main()
