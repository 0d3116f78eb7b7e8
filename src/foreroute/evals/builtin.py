"""The builtin suite: every kind of task, on items that no shipped model was trained on, and held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foreroute.errors import EvaluationError
from foreroute.evals.answers import answer, wilson
from foreroute.evals.tasks import Kind, accuracy_by_kind, held_out_suite, kinds
from foreroute.evals.text import HeldOut, bits_per_char, cut_windows
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.types import NamedProgress


@dataclass(frozen=True)
class SuiteSettings:
    """Everything but the model that decides the figures.

    per_kind: items per kind of task; 0 for none. only: kinds to ask, all when empty. windows: at most this many of each
    source of text; 0 for none. context: scored tokens per window. batch: items answered together. seed: of the items.
    """

    per_kind: int = 100
    only: tuple[str, ...] = ()
    windows: int = 28
    context: int = 512
    batch: int = 50
    seed: int = 0


def check_kinds(held_out: HeldOut, only: Sequence[str]) -> dict[str, Kind]:
    """Return all kinds of tasks by name, after checking `only`; `held_out` has the glossary of `define`.

    Raises:
        EvaluationError: `only` names an unknown kind.
    """
    known = kinds(held_out.glossary)
    unknown = [name for name in only if name not in known]
    if unknown:
        raise EvaluationError(f"There is no kind of task called {unknown[0]}. Known: {', '.join(known)}.")
    return known


def run_suite(
    model: OffloadedModel,
    tokenizer: Any,
    held_out: HeldOut,
    settings: SuiteSettings,
    progress: NamedProgress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Ask every item and score every window of `held_out`; deterministic for a model, threads and settings.

    Args:
        tokenizer: of transformers. progress: called with (activity, done, total).
    Returns:
        accuracy: {kind: {right, asked, share, low, high, multi_step}}; bits_per_char: {source: bits, "all": mean by
        share}; scored_tokens.
    Raises:
        EvaluationError: no chat template, or too little text.
    """
    known = check_kinds(held_out, settings.only)
    figures: dict[str, Any] = {"accuracy": {}, "bits_per_char": {}, "scored_tokens": 0}
    windows = []
    if settings.windows:
        windows = cut_windows(held_out.texts, held_out.shares, tokenizer, settings.context, settings.windows)
    if settings.per_kind:
        items = held_out_suite(settings.per_kind, settings.seed, held_out.glossary, settings.only)
        completions = answer(
            model, tokenizer, items, settings.batch, lambda done, total: progress("answering", done, total)
        )
        for kind, share in accuracy_by_kind(items, completions).items():
            right = round(share * settings.per_kind)
            low, high = wilson(right, settings.per_kind)
            figures["accuracy"][kind] = {
                "right": right, "asked": settings.per_kind, "share": share, "low": low, "high": high,
                "multi_step": known[kind].multi_step,
            }  # fmt: skip
    if windows:
        figures["bits_per_char"] = bits_per_char(model, windows, lambda done, total: progress("reading", done, total))
        figures["scored_tokens"] = sum(one.ids[:, 1:].numel() for one in windows)
    return figures


def run_text(
    model: OffloadedModel,
    tokenizer: Any,
    texts: Sequence[tuple[str, str]],
    settings: SuiteSettings,
    progress: NamedProgress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Score `texts`, (name, text) pairs, equal in "all"; model, tokenizer, settings, progress: see `run_suite`."""
    windows = cut_windows(
        dict(texts), dict.fromkeys((name for name, _ in texts), 1.0), tokenizer, settings.context, settings.windows
    )
    bits = bits_per_char(model, windows, lambda done, total: progress("reading", done, total))
    return {"accuracy": {}, "bits_per_char": bits, "scored_tokens": sum(one.ids[:, 1:].numel() for one in windows)}
