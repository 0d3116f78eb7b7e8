"""Measure a policy's cost and gain: on texts, against exact decoding of the same tokens, and on tasks."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foreroute.engine.interfaces import summed
from foreroute.errors import EvaluationError
from foreroute.evals.fetched_only import FetchCounts, fetched_only
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.caches import cache_argument, cache_of
from foreroute.policy import Policy
from foreroute.predict.sidecar import Sidecar
from foreroute.system.writing import reserve
from foreroute.types import Progress
from foreroute.units import format_memory

_ROWS, _LOGIT_BYTES = 8, 128 * 2**20


@dataclass
class Divergence:
    """Distance of a policy's next-token distributions from exact decoding's, summed over scored tokens.

    nats: the policy's cross-entropy. exact_nats: exact decoding's. kl: from exact to the policy, in nats.
    """

    tokens: int = 0
    nats: float = 0.0
    exact_nats: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    moved_by_tenth: int = 0
    moved_by_one: int = 0
    chars: int = 0

    def add(self, logits: torch.Tensor, exact: torch.Tensor, labels: torch.Tensor) -> None:
        """Compare `logits` with `exact` [tokens, vocabulary] of the same tokens; labels [tokens] are next tokens."""
        ours, theirs = torch.log_softmax(logits.float(), -1), torch.log_softmax(exact.float(), -1)
        at = labels[:, None]
        delta = (theirs.gather(1, at) - ours.gather(1, at)).flatten().double()
        self.tokens += len(labels)
        self.nats -= float(ours.gather(1, at).double().sum())
        self.exact_nats -= float(theirs.gather(1, at).double().sum())
        self.kl += float((theirs.exp() * (theirs - ours)).double().sum())
        self.agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        self.moved_by_tenth += int((delta.abs() > 0.1).sum())
        self.moved_by_one += int((delta.abs() > 1.0).sum())

    def figures(self) -> dict[str, float]:
        """Means over the tokens; `delta_nats` is the policy's loss, positive where it is worse than exact."""
        tokens = self.tokens
        return {
            "delta_nats": (self.nats - self.exact_nats) / tokens,
            "kl": self.kl / tokens,
            "agreement": self.agreed / tokens,
            "moved_by_0.1": self.moved_by_tenth / tokens,
            "moved_by_1": self.moved_by_one / tokens,
            "bits_per_char": self.nats / math.log(2) / self.chars if self.chars else math.nan,
        }


@dataclass
class Cost:
    """Loads and waits under a policy, over tokens. Counts are of experts, except bytes and seconds.

    layers, stalled: MoE layers passed, and those that waited, layer 0 included. missed, waited: misses, and the part
    that was waited for, without layer 0, which waits for all its misses.
    """

    tokens: int = 0
    layers: int = 0
    stalled: int = 0
    missed: int = 0
    waited: int = 0
    bytes_moved: int = 0
    seconds: float | None = None

    @classmethod
    def of_tally(cls, tally: FetchCounts, expert_bytes: int) -> Cost:
        """Costs without a cache, from `tally` and expert_bytes: guesses are loaded, and the misses waited for."""
        moved = tally.fetched + tally.waited + tally.first_waited
        return cls(tally.tokens, tally.layers, tally.stalled, tally.missed, tally.waited, moved * expert_bytes)

    @classmethod
    def of_stats(cls, stats: Any, seconds: float | None) -> Cost:
        """Costs from `stats`, a `PhaseStats` of decoding, and its seconds."""
        moved = stats.demand_bytes + stats.prefetch_bytes + stats.deferred_bytes
        waited = stats.late_hits + stats.misses - stats.first_waited
        missed = waited + stats.substituted
        return cls(stats.tokens, stats.layers, stats.stalled_layers, missed, waited, moved, seconds)

    def figures(self) -> dict[str, float | None]:
        """Figures per token, or shares from 0 to 1; `tpot_ms` is None where time was not measured."""
        return {
            "bytes_per_token": self.bytes_moved / self.tokens if self.tokens else 0.0,
            "stalled_layers": self.stalled / self.layers if self.layers else 0.0,
            "waited_misses": self.waited / self.missed if self.missed else 0.0,
            "waited_per_token": self.waited / self.tokens if self.tokens else 0.0,
            "tpot_ms": None if self.seconds is None or not self.tokens else 1e3 * self.seconds / self.tokens,
        }


@dataclass
class Texts:
    """Windows [windows, context + 1] of token ids, with the exact model's logits for them in a file.

    given: positions at the start of a window that serve as its prompt: exact, and not scored.
    """

    ids: torch.Tensor
    given: int
    chars: int
    _exact: Any = field(default=None, repr=False)

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return len(self.ids) * (self.ids.shape[1] - 1 - self.given)

    def keep_exact(self, folder: Path, vocabulary: int) -> None:
        """Allocate a temporary file in `folder` for the exact logits, [scored, vocabulary] float32.

        Raises:
            EvaluationError: the disk has too little room.
        """
        nbytes = 4 * self.scored * vocabulary
        try:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  the array owns it
            # Allocated at once: writing to a page without room kills the process.
            reserve(file.fileno(), nbytes, folder)
            self._exact = np.memmap(file, np.float32, "w+", shape=(self.scored, vocabulary))
        except OSError as error:
            raise EvaluationError(
                f"The exact logits of {self.scored} tokens take {format_memory(nbytes, round_up=True)} in {folder}: "
                f"{error.strerror}. Ask for fewer --windows."
            ) from error

    def exact(self, start: int, count: int) -> np.ndarray:
        """[count, vocabulary] logits of the scored tokens from `start` on, to read or write."""
        part: np.ndarray = self._exact[start : start + count]
        return part


@torch.no_grad()
def price_fetched_only(
    model: OffloadedModel, sidecar: Sidecar, policy: Policy, ids: torch.Tensor, chars: int, progress: Progress
) -> tuple[Divergence, Cost]:
    """Measure a policy without a cache on windows `ids` [windows, context + 1] of `chars` characters; all are decoded.

    Args:
        model: with all experts in memory; it also computes the exact logits to compare with. sidecar: its predictors.
        progress: called with (windows done, all windows).
    """
    difference = Divergence(chars=chars)
    rows = max(1, min(_ROWS, _LOGIT_BYTES // (4 * model.config.get_text_config().vocab_size * ids.shape[1])))
    totals = FetchCounts()
    for start in range(0, len(ids), rows):
        part = ids[start : start + rows]
        labels = part[:, 1:].flatten()
        exact = model(input_ids=part[:, :-1], use_cache=False).logits.flatten(0, 1)
        with fetched_only(model, sidecar, policy, in_prompts=True) as tally:
            logits = model(input_ids=part[:, :-1], use_cache=False).logits.flatten(0, 1)
        difference.add(logits, exact, labels)
        for name, value in vars(tally).items():
            setattr(totals, name, getattr(totals, name) + value)
        progress(min(start + rows, len(ids)), len(ids))
    return difference, Cost.of_tally(totals, model.foreroute.plan.expert_bytes)


@torch.no_grad()
def price_decoding(
    model: OffloadedModel, policy: Policy, texts: Texts, progress: Progress, *, is_reference: bool = False
) -> tuple[Divergence, Cost]:
    """Measure a policy with the model's own cache of experts: the windows of `texts` are fed token by token.

    Args:
        progress: called with (done, all). is_reference: keep the logits as the exact ones that others are compared to.
    """
    difference = Divergence(chars=texts.chars)
    model.foreroute.set_policy(policy)
    spent, costs = 0.0, []
    try:
        for number, row in enumerate(texts.ids):
            prompt, rest = row[: texts.given], row[texts.given : -1]
            cache = cache_of(model(input_ids=prompt[None], use_cache=True))
            before = model.foreroute.stats()
            started = time.perf_counter()
            said = []
            for token in rest:
                output = model(input_ids=token[None, None], **cache_argument(cache), use_cache=True)
                said.append(output.logits[0, -1:])
            spent += time.perf_counter() - started
            costs.append(model.foreroute.stats().minus(before).decode)
            logits = torch.cat(said).float()
            kept = texts.exact(number * len(rest), len(rest))
            if is_reference:
                kept[:] = logits.numpy()
            difference.add(logits, torch.from_numpy(np.array(kept)), row[texts.given + 1 :])
            progress(number + 1, len(texts.ids))
    finally:
        model.foreroute.set_policy(Policy())
    return difference, Cost.of_stats(summed(costs), spent)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, loss) that no other of `points` beats in both (lower is better), cheapest first."""
    best, front = math.inf, []
    for cost, loss in sorted(points):
        if loss < best:
            best = loss
            front.append((cost, loss))
    return front
