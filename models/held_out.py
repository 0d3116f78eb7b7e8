"""Bits per character on held-out text."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from models.tokenizer import END_OF_TEXT


@dataclass(frozen=True)
class Windows:
    """Held-out windows of one source: ids [windows, seq_len + 1], and the characters that the scored tokens spell."""

    source: str
    share: float
    ids: Tensor
    chars: int


def sample_windows(work: Path, tokenizer: Tokenizer, seq_len: int, per_source: int) -> list[Windows]:
    """Evenly spaced windows of every source's held-out text; the first token of a window is given, not scored."""
    found = []
    held_out: dict[str, str] = json.loads((work / "held_out.json").read_text())
    shares: dict[str, float] = json.loads((work / "sources.json").read_text())
    for source, share in shares.items():
        ids = tokenizer.encode(END_OF_TEXT + held_out[source]).ids
        count = min(per_source, (len(ids) - 1) // seq_len)
        stride = (len(ids) - 1) // count
        rows = [ids[n * stride : n * stride + seq_len + 1] for n in range(count)]
        chars = sum(len(tokenizer.decode(row[1:], skip_special_tokens=False)) for row in rows)
        found.append(Windows(source, share, torch.tensor(rows), chars))
    return found


@torch.no_grad()
def bits_per_char(model: PreTrainedModel, windows: list[Windows], batch: int = 4) -> dict[str, float]:
    """Bits per character by source, and "all": their mean weighted by the sources' shares.

    Nats of all scored tokens / ln 2 / characters; every window starts without context.
    """
    found: dict[str, float] = {}
    for one in windows:
        nats = 0.0
        for rows in one.ids.split(batch):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
            nats += torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
            ).item()
        found[one.source] = nats / math.log(2) / one.chars
    found["all"] = sum(one.share * found[one.source] for one in windows) / sum(one.share for one in windows)
    return found
