"""Evaluate every policy at every budget: one row of figures each, on texts and tasks, resumable row by row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foreroute.errors import EvaluationError
from foreroute.evals.answers import answer, wilson
from foreroute.evals.fetched_only import fetched_only
from foreroute.evals.pricing import Cost, Divergence, Texts, price_decoding, price_fetched_only
from foreroute.evals.tasks import Item, accuracy_by_kind
from foreroute.evals.text import num_chars
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.policy import Policy
from foreroute.predict.sidecar import Sidecar
from foreroute.types import NamedProgress
from foreroute.whole_files import atomic_write

# The budget of a run without a cache: at each layer, only the experts guessed for it are resident.
NO_CACHE = "none"
_PROMPT_SHARE = 8

# Tasks of another harness: model -> accuracy by task.
OtherTasks = Callable[[OffloadedModel], Mapping[str, float]]


@dataclass(frozen=True)
class Rows:
    """Policies and memories to evaluate: every pair, in this order.

    memories: budgets as `load` takes them, or NO_CACHE.
    deterministic: by logical time; no times are then reported.
    """

    policies: tuple[Policy, ...]
    memories: tuple[str, ...]
    deterministic: bool

    def pairs(self) -> list[tuple[Policy, str]]:
        """List (policy, memory) of every row."""
        return [(policy, memory) for memory in self.memories for policy in self.policies]


@dataclass(frozen=True)
class Material:
    """Text and tasks to evaluate on: windows [windows, context + 1] of ids, and items with one right answer each.

    batch: items answered together without a cache. others: tasks of another harness; others_in_prompts: the policy also
    applies in their prompts, which likelihoods need to show its effect; without a cache only.
    """

    windows: torch.Tensor
    items: tuple[Item, ...]
    batch: int
    others: OtherTasks | None = None
    others_in_prompts: bool = False

    def digest(self) -> str:
        """Hash of these windows and items."""
        whole = hashlib.sha256(self.windows.numpy().tobytes())
        whole.update(json.dumps([[item.kind, item.prompt, item.answer] for item in self.items]).encode())
        return whole.hexdigest()

    @property
    def given(self) -> int:
        """Tokens at the start of a window that serve as its prompt in decoding."""
        return max(1, (self.windows.shape[1] - 1) // _PROMPT_SHARE)


class FinishedRows:
    """Rows that are done, kept in a file until all are, so that a stopped run can continue.

    Args:
        path: of the file. about: everything that decides the figures; rows with another `about` are ignored.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self._digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
        self._path = path.with_name(f"{path.name}-{self._digest[:16]}.json")
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            if saved["of"] == self._digest:
                self.rows = saved["rows"]
        except (OSError, ValueError, KeyError, TypeError):
            # No file, or a truncated one: recompute its rows.
            self.rows = {}

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Save `row` under `name`."""
        self.rows[name] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._path) as beside:
            beside.write_text(json.dumps({"of": self._digest, "rows": self.rows}), encoding="utf-8")

    def forget(self) -> None:
        """Delete the file, once all rows are shown."""
        self._path.unlink(missing_ok=True)


def run_policies(
    load: Callable[[str], Any],
    tokenizer: Any,
    sidecar: Sidecar | None,
    rows: Rows,
    material: Material,
    finished: FinishedRows,
    scratch: Path,
    progress: NamedProgress = lambda what, done, total: None,
) -> list[dict[str, Any]]:
    """Compute every row, in the order of `rows.pairs()`; those in `finished` are reused.

    Args:
        load: a memory ("100%", "8GiB") -> a new model, exact, with the predictors and switches under test.
        tokenizer: of transformers. sidecar: fitted predictors, for rows without a cache. material: see `Material`.
        scratch: folder for the exact logits during the run. progress: called with (activity, done, total).
    Raises:
        PolicyError, EvaluationError: a row cannot be computed; raised before any is.
    """
    _check(load, sidecar, rows)
    texts: Texts | None = None
    if len(material.windows):
        ids, given = material.windows, material.given
        texts = Texts(ids, given, num_chars(tokenizer, ids, given + 1))
    made: list[dict[str, Any]] = []
    has_reference = False
    for policy, memory in rows.pairs():
        name = f"{policy} at {memory}"
        if name not in finished.rows:
            runner = _Row(load, tokenizer, sidecar, policy, memory, material, rows.deterministic, name, progress)
            if memory == NO_CACHE:
                finished.add(name, runner.without_cache())
            else:
                if texts is not None and not has_reference:
                    _keep_reference(load(memory), texts, scratch, progress)
                    has_reference = True
                finished.add(name, runner.with_cache(texts))
        made.append(finished.rows[name])
    return made


def _check(load: Callable[[str], Any], sidecar: Sidecar | None, rows: Rows) -> None:
    """Check that every row can be computed, on a model loaded for this."""
    if NO_CACHE in rows.memories and sidecar is None:
        raise EvaluationError(
            f"--memory {NO_CACHE} shows the effect of guesses alone: it needs fitted predictors. Run `foreroute fit`."
        )
    memories = ["100%" if memory == NO_CACHE else memory for memory in rows.memories]
    for memory in dict.fromkeys(memories):
        model = load(memory)
        with closing(model.foreroute):
            for policy in rows.policies:
                model.foreroute.check_policy(policy)


def _keep_reference(model: OffloadedModel, texts: Texts, scratch: Path, progress: NamedProgress) -> None:
    """Record the exact logits that all rows with a cache are compared with."""
    with closing(model.foreroute):
        texts.keep_exact(scratch, model.config.get_text_config().vocab_size)
        price_decoding(model, Policy(), texts, _named(progress, "decoding exactly"), is_reference=True)


@dataclass
class _Row:
    """Computes one row."""

    load: Callable[[str], Any]
    tokenizer: Any
    sidecar: Sidecar | None
    policy: Policy
    memory: str
    material: Material
    deterministic: bool
    name: str
    progress: NamedProgress

    def without_cache(self) -> dict[str, Any]:
        """Evaluate without a cache: only the experts guessed for a layer are resident."""
        assert self.sidecar is not None, "checked before"
        model, found = self.load("100%"), self._head()
        with closing(model.foreroute):
            ids = self.material.windows
            if len(ids):
                difference, cost = price_fetched_only(
                    model, self.sidecar, self.policy, ids, num_chars(self.tokenizer, ids), self._named("text")
                )
                found |= _figures(difference, cost, timed=False)
            in_prompts = self.material.others is not None and self.material.others_in_prompts
            with fetched_only(model, self.sidecar, self.policy, in_prompts=in_prompts) as tally:
                found |= self._answers(model, self.material.batch)
                if self.material.others is not None:
                    found["accuracy"] |= self.material.others(model)
            if not len(ids):
                found |= Cost.of_tally(tally, model.foreroute.plan.expert_bytes).figures()
        return found

    def with_cache(self, texts: Texts | None) -> dict[str, Any]:
        """Evaluate with a pool of this budget, decoding one token at a time."""
        model, found = self.load(self.memory), self._head()
        with closing(model.foreroute):
            if texts is not None:
                difference, cost = price_decoding(model, self.policy, texts, self._named("text"))
                found |= _figures(difference, cost, timed=not self.deterministic)
            model.foreroute.set_policy(self.policy)
            before = model.foreroute.stats()
            # One at a time: a batch would share its experts, a different case.
            found |= self._answers(model, 1)
            if self.material.others is not None:
                found["accuracy"] |= self.material.others(model)
            if texts is None:
                found |= Cost.of_stats(model.foreroute.stats().minus(before).decode, None).figures()
        return found

    def _head(self) -> dict[str, Any]:
        return {"policy": self.policy.name, "tau": self.policy.tau, "memory": self.memory}

    def _named(self, what: str) -> Callable[[int, int], None]:
        return _named(self.progress, f"{self.name}: {what}")

    def _answers(self, model: OffloadedModel, batch: int) -> dict[str, Any]:
        items = self.material.items
        if not items:
            return {"accuracy": {}, "interval": {}}
        completions = answer(model, self.tokenizer, items, batch, self._named("tasks"))
        shares = accuracy_by_kind(items, completions)
        asked = {kind: sum(item.kind == kind for item in items) for kind in shares}
        right = {kind: round(share * asked[kind]) for kind, share in shares.items()}
        return {
            "accuracy": shares,
            "interval": {kind: wilson(right[kind], asked[kind]) for kind in shares},
            "answers": hashlib.sha256("\0".join(completions).encode()).hexdigest()[:16],
        }


def _figures(difference: Divergence, cost: Cost, *, timed: bool) -> dict[str, Any]:
    found = {**difference.figures(), **cost.figures(), "scored_tokens": difference.tokens}
    if not timed:
        found["tpot_ms"] = None
    return found


def _named(progress: NamedProgress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


def mean_accuracy(row: Mapping[str, Any]) -> float | None:
    """Mean over the row's tasks; None where there are none."""
    shares = list(row["accuracy"].values())
    return sum(shares) / len(shares) if shares else None
