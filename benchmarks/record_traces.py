"""Traces of a model that reads text token by token: routes of real text, where its own would go in circles.

    python -m benchmarks.record_traces models/foreroute-tiny ... --text held-out.txt ... --out build/traces

Each passage's beginning is a prompt; the rest is fed as if the model had said it. One trace per model and budget. With
fitted predictors (`--sidecars FOLDER`, one file per model, named as it) guesses are theirs, else the lookahead's. Every
decode step has all its guesses, as the governor is off: it narrows them by the time that this machine takes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import foreroute
from foreroute import EngineConfig
from foreroute.model.caches import cache_argument, cache_of
from foreroute.model.text import load_tokenizer
from foreroute.prepare.corpus import read_corpus


def record(folder: Path, memory: str, texts: list[Path], tokens: Sequence[int], config: EngineConfig) -> None:
    """Write one trace; tokens: passages, tokens of the prompt, tokens that are fed one by one."""
    passages, prompt, fed = tokens
    corpus = read_corpus(load_tokenizer(folder), texts, passages * (prompt + fed), prompt + fed)
    model = foreroute.load(folder, memory, config=config)
    try:
        with torch.inference_mode():
            for window in corpus.windows[:passages, None]:
                cache = cache_of(model(input_ids=window[:, :prompt], use_cache=True))
                for at in range(prompt, prompt + fed):
                    cache = cache_of(model(input_ids=window[:, at : at + 1], **cache_argument(cache)))
    finally:
        model.foreroute.close()


def main() -> None:
    """Record every model at every budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--memory", nargs="+", default=["25%", "50%"])
    parser.add_argument("--tokens", type=int, nargs=3, default=(16, 48, 128), metavar=("PASSAGES", "PROMPT", "FED"))
    parser.add_argument("--eviction", default="lfu")
    parser.add_argument("--no-guesses", action="store_true")
    parser.add_argument("--sidecars", type=Path, default=Path("build/sidecars"))
    parser.add_argument("--out", type=Path, default=Path("build/traces"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for folder in asked.models:
        sidecar = asked.sidecars / f"{folder.name}.safetensors"
        for memory in asked.memory:
            path = asked.out / f"{folder.name}-{memory.rstrip('%')}.jsonl"
            config = EngineConfig(
                trace=str(path),
                eviction=asked.eviction,
                prefetch="none" if asked.no_guesses else "lookahead",
                predictor=str(sidecar) if sidecar.exists() and not asked.no_guesses else "no",
                prefetch_prefill="off",
                governor=False,
            )
            record(folder, memory, asked.text, asked.tokens, config)
            print(path, f"{path.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
