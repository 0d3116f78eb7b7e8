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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from models import attention, experts
from models.export import untrained
from models.families import RECIPES
from models.held_out import bits_per_char, sample_windows
from models.router_stats import as_records, router_stats
from models.tasks import Item, accuracy_by_kind, held_out_suite
from models.tokenizer import ASSISTANT, END, USER


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: list[Item], batch: int = 50) -> list[str]:
    """Greedy completions through the chat template, in batches of similar length, left-padded."""
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": item.prompt}] for item in items]
    prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    longest = [len(tokenizer(item.answer).input_ids) + 8 for item in items]
    order = sorted(range(len(items)), key=lambda n: (longest[n], len(prompts[n])))
    found = [""] * len(items)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        inputs = tokenizer([prompts[n] for n in part], return_tensors="pt", padding=True, add_special_tokens=False)
        limit = max(longest[n] for n in part)
        output = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        for n, ids in zip(part, output[:, inputs.input_ids.shape[1] :], strict=True):
            found[n] = tokenizer.decode(ids, skip_special_tokens=True)
    return found


def evaluate(folder: Path, work: Path, per_kind: int, windows_per_source: int, seed: int = 0) -> dict[str, Any]:
    """All figures of the model card: bits/char by source, accuracy by kind, router statistics beside the untrained."""
    recipe = RECIPES[folder.name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    glossary = json.loads((work / "glossary.json").read_text())["held_out"]
    began = time.perf_counter()
    windows = sample_windows(work, tokenizer.backend_tokenizer, recipe.seq_len, windows_per_source)
    experts.register()
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    items = held_out_suite(per_kind, seed, glossary)
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
    (options.folder / "figures.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps({key: value for key, value in figures.items() if key != "samples"}, indent=1))


if __name__ == "__main__":
    main()
