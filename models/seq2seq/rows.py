"""Rows of an encoder-decoder: text with spans replaced by sentinel tokens, and task items as text-to-text.

Sentinels `<extra_id_0>` .. stand behind the shared vocabulary. In the encoder one stands for each span; the decoder
writes every sentinel with what it stood for, one more sentinel, and the end token.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from foreroute.evals import tasks
from models.data import IGNORE, OTHER_KIND_WEIGHT
from models.tokenizer import END, NUM_SENTINELS, VOCAB_SIZE, wrap

PAD, END_ID = 0, 4
WINDOW, SPANS, HIDDEN = 306, 25, 76  # tokens of a text window, spans hidden in it, and their tokens together
ENCODER_LENGTH = WINDOW - HIDDEN + SPANS + 1
DECODER_LENGTH = HIDDEN + SPANS + 2
TAIL = DECODER_LENGTH - 3  # tokens of the span when it is the end of the window
POOL, STEP = 96, 8  # items drawn to find some of like length; lengths are multiples of STEP


def sentinel(number: int) -> int:
    """Token id of `<extra_id_NUMBER>`."""
    assert number < NUM_SENTINELS
    return VOCAB_SIZE + number


def with_sentinels(folder: Path) -> PreTrainedTokenizerFast:
    """The shared tokenizer of `folder` with sentinels behind its vocabulary; it ends what it encodes, as T5's do."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = [f"<extra_id_{number}>" for number in range(NUM_SENTINELS)]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    backend.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, END_ID)])
    tokenizer = wrap(backend)
    tokenizer.chat_template = None
    tokenizer.model_max_length = 512
    return tokenizer


@dataclass(frozen=True)
class Batch:
    """Encoder ids [rows, length] and labels [rows, decoder length], IGNORE where unscored; `kept` and `decoded` mark
    what is no padding, None when nothing is."""

    ids: Tensor
    labels: Tensor
    kept: Tensor | None = None
    decoded: Tensor | None = None

    @property
    def decoder_ids(self) -> Tensor:
        """The labels one place to the right behind the start token."""
        shifted = torch.full_like(self.labels, PAD)
        shifted[:, 1:] = self.labels[:, :-1]
        return shifted.masked_fill_(shifted == IGNORE, PAD)


def cut(rng: random.Random, total: int, parts: int) -> list[int]:
    """`total` in `parts` pieces of at least one, every division equally likely."""
    marks = sorted(rng.sample(range(1, total), parts - 1))
    return [stop - start for start, stop in zip([0, *marks], [*marks, total], strict=True)]


def hide_spans(rng: random.Random, window: Sequence[int]) -> tuple[list[int], list[int]]:
    """Encoder ids and labels of a window of WINDOW tokens with SPANS random spans hidden."""
    encoder: list[int] = []
    labels: list[int] = []
    at = 0
    hidden = cut(rng, HIDDEN, SPANS)
    shown = cut(rng, len(window) - HIDDEN, SPANS)
    for number, (before, length) in enumerate(zip(shown, hidden, strict=True)):
        encoder += [*window[at : at + before], sentinel(number)]
        labels += [sentinel(number), *window[at + before : at + before + length]]
        at += before + length
    return [*encoder, END_ID], [*labels, sentinel(SPANS), END_ID]


def hide_tail(window: Sequence[int]) -> tuple[list[int], list[int]]:
    """The same with one span, the end of the window: what follows a text is asked."""
    shown = ENCODER_LENGTH - 2
    tail = window[shown : shown + TAIL]
    return [*window[:shown], sentinel(0), END_ID], [sentinel(0), *tail, sentinel(1), END_ID]


def padded(rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Rows of different lengths as one batch."""
    longest = [-(-max(len(row[side]) for row in rows) // STEP) * STEP for side in (0, 1)]
    ids = torch.full((len(rows), longest[0]), PAD)
    labels = torch.full((len(rows), longest[1]), IGNORE)
    for number, (encoder, answer) in enumerate(rows):
        ids[number, : len(encoder)] = torch.tensor(encoder)
        labels[number, : len(answer)] = torch.tensor(answer)
    lengths = torch.tensor([len(encoder) for encoder, _ in rows])
    return Batch(ids, labels, torch.arange(longest[0]) < lengths[:, None], labels != IGNORE)


class Rows:
    """Draws the rows of a part of a step, all of a sort: hidden spans, a hidden tail, or task items of like length."""

    def __init__(
        self, work: Path, seed: int, text_share: float, tail_share: float, weights: Mapping[str, float]
    ) -> None:
        self.seed, self.text_share, self.tail_share = seed, text_share, tail_share
        self.tokenizer = with_sentinels(work).backend_tokenizer
        shares: dict[str, float] = json.loads((work / "sources.json").read_text(encoding="utf-8"))
        self.streams = {name: np.memmap(work / f"{name}.train.u16", dtype=np.uint16) for name in shares}
        self.shares = list(shares.values())
        self.kinds = tasks.kinds(json.loads((work / "glossary.json").read_text(encoding="utf-8"))["train"])
        self.weights = [weights.get(name, OTHER_KIND_WEIGHT) for name in self.kinds]

    def batch(self, step: int, part: int, num_rows: int) -> Batch:
        """`num_rows` rows of text, or as many items as fill about as many tokens."""
        rng = random.Random(f"{self.seed}/{step}/{part}")
        if rng.random() >= self.text_share:
            return self._items(rng, num_rows * (ENCODER_LENGTH + DECODER_LENGTH))
        tail = rng.random() < self.tail_share
        windows = [self._window(rng) for _ in range(num_rows)]
        rows = [hide_tail(window) if tail else hide_spans(rng, window[:WINDOW]) for window in windows]
        return Batch(torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows]))

    def _window(self, rng: random.Random) -> list[int]:
        (name,) = rng.choices(list(self.streams), self.shares)
        length = max(WINDOW, ENCODER_LENGTH + TAIL)
        start = rng.randrange(len(self.streams[name]) - length)
        return self.streams[name][start : start + length].astype(np.int64).tolist()

    def _items(self, rng: random.Random, budget: int) -> Batch:
        names = rng.choices(list(self.kinds), self.weights, k=POOL)
        items = [tasks.draw(self.kinds[name], rng, held_out=False) for name in names]
        prompts = self.tokenizer.encode_batch([item.prompt for item in items])
        answers = self.tokenizer.encode_batch([item.answer for item in items])
        pool = sorted(
            ((one.ids, two.ids) for one, two in zip(prompts, answers, strict=True)), key=lambda row: len(row[0])
        )
        start = rng.randrange(POOL)
        chosen: list[tuple[list[int], list[int]]] = []
        for row in pool[start:]:
            if chosen and (len(chosen) + 1) * (len(row[0]) + len(row[1])) > budget:
                break
            chosen.append(row)
        return padded(chosen)
