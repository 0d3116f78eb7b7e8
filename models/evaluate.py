"""Evaluate an exported folder: bits per character, accuracy by kind of task, router statistics.

    python models/evaluate.py models/foreroute-tiny --work WORK [--per-kind 100]

WORK is where `train.py` prepared the held-out data (`train.py NAME --prepare-only` regenerates it).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python models/evaluate.py` finds the package

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from foreroute.evals.answers import answer
from foreroute.evals.tasks import Item, accuracy_by_kind, held_out_suite
from foreroute.evals.text import bits_per_char, cut_windows
from models import attention, experts
from models.data import held_out
from models.export import untrained
from models.families import recipe_of
from models.router_stats import as_records, router_stats
from models.tokenizer import ASSISTANT, END, USER


def evaluate(folder: Path, work: Path, per_kind: int, windows_per_source: int, seed: int = 0) -> dict[str, Any]:
    """All figures of the model card: bits/char by source, accuracy by kind, router statistics beside the untrained."""
    recipe = recipe_of(folder.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = held_out(work)
    began = time.perf_counter()
    windows = cut_windows(text.texts, text.shares, tokenizer, recipe.seq_len, windows_per_source)
    experts.register()
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    items = held_out_suite(per_kind, seed, text.glossary)
    rows = torch.cat([*(one.ids[:8, :-1] for one in windows), _item_rows(tokenizer, items, recipe.seq_len, 64)])
    completions = answer(model, tokenizer, items)
    model.config._experts_implementation = experts.IMPLEMENTATION
    figures: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bits_per_char": bits_per_char(model, windows),
        "scored_tokens": sum(one.ids[:, 1:].numel() for one in windows),
        "accuracy": accuracy_by_kind(items, completions),
        "per_kind": per_kind,
        "router": as_records(router_stats(model, rows)),
        "router_untrained": as_records(router_stats(untrained(recipe).eval(), rows)),
        "samples": _samples(items, completions),
    }
    figures["seconds"] = time.perf_counter() - began
    return figures


def _item_rows(tokenizer: PreTrainedTokenizerFast, items: list[Item], length: int, num_rows: int) -> torch.Tensor:
    """Items with their right answers, every kind alike, as chat rows [up to num_rows, length]."""
    spread = sorted(range(len(items)), key=lambda n: n * 7919 % len(items))
    text = "".join(f"{USER}{items[n].prompt}{ASSISTANT}{items[n].answer}{END}" for n in spread)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    return ids[: min(num_rows, len(ids) // length) * length].view(-1, length)


def _samples(items: list[Item], completions: list[str]) -> list[dict[str, str]]:
    first: dict[str, dict[str, str]] = {}
    for item, completion in zip(items, completions, strict=True):
        sample = {"kind": item.kind, "prompt": item.prompt, "expected": item.answer, "got": completion}
        first.setdefault(item.kind, sample)
    return list(first.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder with the prepared data")
    parser.add_argument("--per-kind", type=int, default=100)
    parser.add_argument("--windows", type=int, default=28, help="held-out windows per source")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = evaluate(options.folder, options.work, options.per_kind, options.windows)
    (options.folder / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(json.dumps({key: value for key, value in figures.items() if key != "samples"}, indent=1))


if __name__ == "__main__":
    main()
