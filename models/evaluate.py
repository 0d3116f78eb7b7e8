"""Evaluate an exported folder: bits per character, accuracy by kind of task, router statistics.

    python models/evaluate.py models/foreroute-tiny --work WORK [--per-kind 100]

WORK is where `train.py` prepared the held-out data (`train.py NAME --prepare-only` regenerates it).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python models/evaluate.py` finds the package

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

from foreroute.evals.answers import answer
from foreroute.evals.tasks import Item, accuracy_by_kind, held_out_suite
from foreroute.evals.text import HeldOut, TextWindows, bits_per_char, cut_windows
from models import acceptance, attention, experts
from models.data import held_out
from models.export import untrained
from models.families import RECIPES, Recipe, recipe_of
from models.router_stats import as_records, router_stats
from models.seq2seq import figures as seq2seq
from models.tokenizer import ASSISTANT, END, USER

# What acceptance is measured on: windows of each source, and items; an encoder-decoder's routers meet the items too.
DRAFTED_WINDOWS, DRAFTED_ITEMS = 8, 325


def evaluate(folder: Path, work: Path, per_kind: int, windows_per_source: int, seed: int = 0) -> dict[str, Any]:
    """All figures of the model card: bits/char by source, accuracy by kind, router statistics beside the untrained;
    of a draft, how often the models it drafts for agree with it."""
    recipe = recipe_of(folder.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = held_out(work)
    began = time.perf_counter()
    items = held_out_suite(per_kind, seed, text.glossary)
    measure = _encoder_decoder if recipe.config().is_encoder_decoder else _decoder
    figures, completions = measure(recipe, folder, tokenizer, text, items, windows_per_source)
    figures |= {
        "accuracy": accuracy_by_kind(items, completions),
        "per_kind": per_kind,
        "samples": _samples(items, completions),
        "seconds": time.perf_counter() - began,
    }
    return figures


Measured = tuple[dict[str, Any], list[str]]  # figures, and the answers to the items


def _decoder(
    recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerFast, text: HeldOut, items: list[Item], per_source: int
) -> Measured:
    windows = cut_windows(text.texts, text.shares, tokenizer, recipe.seq_len, per_source)
    experts.register()
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    rows = torch.cat([*(one.ids[:8, :-1] for one in windows), _item_rows(tokenizer, items, recipe.seq_len, 64)])
    completions = answer(model, tokenizer, items)
    model.config._experts_implementation = experts.IMPLEMENTATION
    figures: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bits_per_char": bits_per_char(model, windows),
        "scored_tokens": sum(one.ids[:, 1:].numel() for one in windows),
    }
    if experts.routers_of(model):
        figures["router"] = as_records(router_stats(model, rows))
        figures["router_untrained"] = as_records(router_stats(untrained(recipe).eval(), rows))
    if recipe.drafts_for:
        figures["acceptance"] = _acceptance(folder, tokenizer, windows, items[:: max(1, len(items) // DRAFTED_ITEMS)])
    return figures, completions


def _acceptance(
    folder: Path, tokenizer: PreTrainedTokenizerFast, windows: list[TextWindows], items: list[Item]
) -> dict[str, Any]:
    """How often the greedy tokens of the models that share the tokenizer are the draft's; all of them in bf16."""
    draft = acceptance.load(folder)
    few = [replace(one, ids=one.ids[:DRAFTED_WINDOWS]) for one in windows]
    decoders = [one.name for one in RECIPES.values() if not one.drafts_for and not one.config().is_encoder_decoder]
    found = {}
    for name in decoders:
        target = acceptance.load(acceptance.MODELS / name)
        found[name] = {
            "text": acceptance.on_text(draft, target, few),
            "tasks": acceptance.on_tasks(draft, target, tokenizer, items),
        }
    return found


def _encoder_decoder(
    recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerFast, text: HeldOut, items: list[Item], per_source: int
) -> Measured:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    spans, tails = (
        seq2seq.hide_text(text.texts, text.shares, tokenizer, per_source, tail=tail) for tail in (False, True)
    )
    rows = [batch for one in (*spans, *tails) for batch in one.batches[:1]]
    rows += seq2seq.item_batches(tokenizer, items[:: max(1, len(items) // DRAFTED_ITEMS)])
    logits = seq2seq.transformers_logits(model)
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bits_per_char": seq2seq.bits_per_hidden_char(logits, spans),
        "bits_per_char_tail": seq2seq.bits_per_hidden_char(logits, tails),
        "scored_tokens": sum(batch.labels.numel() for one in (*spans, *tails) for batch in one.batches),
        "router": as_records(seq2seq.router_stats(model, rows)),
        "router_untrained": as_records(seq2seq.router_stats(untrained(recipe).eval(), rows)),
    }
    return figures, seq2seq.answer(model, tokenizer, items)


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
