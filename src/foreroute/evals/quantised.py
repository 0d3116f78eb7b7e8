"""Measure the cost of quantising: a text's perplexity with a quantised store beside the model as stored."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreroute.config import EngineConfig
from foreroute.evals.text import TextWindows, bits_per_char
from foreroute.loading.load import load
from foreroute.types import Progress


@dataclass(frozen=True)
class Reading:
    """Scores of one model on the text. nats: summed over scored tokens. bits_per_char: by source."""

    nats: float
    num_tokens: int
    num_chars: int
    bits_per_char: dict[str, float]

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(self.nats / self.num_tokens)

    @property
    def bits(self) -> float:
        """Bits per character over all text."""
        return self.nats / math.log(2) / self.num_chars

    def figures(self) -> dict[str, Any]:
        """The figures for JSON."""
        return {"perplexity": self.perplexity, "bits_per_char": self.bits, "by_file": self.bits_per_char}


def read(folder: Path, packed: str, windows: list[TextWindows], memory: str | None, progress: Progress) -> Reading:
    """Load the model of `folder`, and score the windows with it.

    Args:
        packed: as EngineConfig has it. memory: budget for experts; chosen when None.
        progress: called with (windows done, all windows).
    Raises:
        ForerouteError: the model or the store cannot be loaded.
    """
    config = EngineConfig(packed=packed, prefetch="none", predictor="no")
    model = load(folder, memory, config=config)
    with closing(model.foreroute):
        by_source = bits_per_char(model, windows, progress)
    nats = sum(by_source[one.source] * one.chars for one in windows) * math.log(2)
    num_tokens = sum(one.ids[:, 1:].numel() for one in windows)
    del by_source["all"]
    return Reading(nats, num_tokens, sum(one.chars for one in windows), by_source)


def compared(stored: Reading, packed: Reading) -> dict[str, Any]:
    """Figures of `stored` and `packed`, with their relative differences: .02 is two per cent worse."""
    return {
        "tokens": stored.num_tokens,
        "chars": stored.num_chars,
        "stored": stored.figures(),
        "packed": packed.figures(),
        "perplexity_delta": packed.perplexity / stored.perplexity - 1,
        "bits_per_char_delta": packed.bits / stored.bits - 1,
    }
