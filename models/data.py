"""Prepared data: deduplicated, split by document, tokenised; and the rows that training reads.

Prepared once under a work folder: tokenizer.json, <source>.train.u16 (token ids), held_out.json (text by source),
glossary.json (both splits of the `define` task). Rows are drawn by (seed, step, part), so a resumed run reads what an
uninterrupted one would have read.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from foreroute.evals import tasks
from foreroute.evals.text import HeldOut, TextWindows, cut_windows
from models import sources
from models.tokenizer import ASSISTANT, END, END_OF_TEXT, USER, VOCAB_SIZE, load_tokenizer, train_tokenizer

HELD_OUT_DOCUMENTS = 50  # one document in so many
SOURCE_CHARS = 12_000_000  # read at most this much of one source
HELD_OUT_CHARS = 600_000  # kept per source for evaluation
IGNORE = -100
OTHER_KIND_WEIGHT = 0.3  # of a kind that a recipe does not name
KIND_WEIGHTS = {
    "add": 2.0, "subtract": 1.6, "story": 1.4, "sort": 1.4, "reverse": 1.0, "dedupe": 1.0, "count": 1.0,
    "recall": 2.0, "brackets": 1.0, "copy": 0.8, "calendar": 1.0, "expression": 1.4, "define": 1.6,
}  # fmt: skip


def is_held_out_document(source: str, name: str) -> bool:
    """True for the one document in fifty that no model trains on."""
    return zlib.crc32(f"{source}/{name}".encode()) % HELD_OUT_DOCUMENTS == 0


def split_documents(
    source: str, documents: list[sources.Document], seen: set[int], max_chars: int = SOURCE_CHARS
) -> tuple[list[str], list[str]]:
    """Split into (train, held out), dropping every paragraph that an earlier document of the run already had.

    Training documents are read first: a paragraph that both splits have is removed from the held-out one.
    """
    documents = sorted(documents, key=lambda one: zlib.crc32(one[0].encode()))
    parts: tuple[list[str], list[str]] = ([], [])
    for held_out in (False, True):
        budget = HELD_OUT_CHARS if held_out else max_chars
        for name, text in documents:
            if is_held_out_document(source, name) != held_out or budget <= 0:
                continue
            kept = []
            for paragraph in re.split(r"\n\n+", text):
                mark = hash(" ".join(paragraph.split()))
                if len(paragraph) < 60 or mark not in seen:
                    kept.append(paragraph)
                seen.add(mark)
            fresh = "\n\n".join(kept)
            if len(fresh) > 20:
                parts[held_out].append(fresh)
                budget -= len(fresh)
    return parts


def glossary_of(entries: list[str]) -> dict[str, str]:
    """One short gloss per single word, from `word: gloss` lines."""
    found: dict[str, str] = {}
    for entry in entries:
        word, _, gloss = entry.strip().partition(": ")
        gloss = gloss.split(";")[0].strip()
        if re.fullmatch(r"[a-z]{3,10}", word) and re.fullmatch(r"[a-z ,()'-]{15,60}", gloss):
            found.setdefault(word, gloss)
    return found


def prepare(
    work: Path,
    chosen: Sequence[sources.Source] = sources.SOURCES,
    max_chars: int = SOURCE_CHARS,
    vocab_size: int = VOCAB_SIZE,
) -> None:
    """Fetch, clean, split, train the tokenizer and tokenise: everything that training and evaluation read.

    Cost: about a minute on two cores, and 100 MB of downloads; nothing when `work` is prepared already.
    """
    if (work / "prepared").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    train: dict[str, list[str]] = {}
    held_out: dict[str, str] = {}
    glossaries: dict[str, dict[str, str]] = {"train": {}, "held_out": {}}
    for source in chosen:
        kept, reserved = split_documents(source.name, sources.documents(source, work / "cache"), seen, max_chars)
        train[source.name], held_out[source.name] = kept, "\n\n".join(reserved)
        if source.name == "wordnet":
            glossaries = {"train": glossary_of(kept), "held_out": glossary_of(reserved)}
        print(f"{source.name}: {sum(map(len, kept)) / 1e6:.1f} M chars, {len(kept)} documents", flush=True)
    for word in glossaries["train"].keys() & glossaries["held_out"].keys():
        del glossaries["held_out"][word]
    (work / "sources.json").write_text(json.dumps({source.name: source.share for source in chosen}), encoding="utf-8")
    (work / "glossary.json").write_text(json.dumps(glossaries), encoding="utf-8")
    (work / "held_out.json").write_text(json.dumps(held_out), encoding="utf-8")
    tokenizer = train_tokenizer(_tokenizer_texts(train, chosen, glossaries["train"]), vocab_size)
    tokenizer.backend_tokenizer.save(str(work / "tokenizer.json"))
    for name, texts in train.items():
        encoded = tokenizer.backend_tokenizer.encode_batch([END_OF_TEXT + text for text in texts])
        ids = np.concatenate([np.asarray(one.ids, dtype=np.uint16) for one in encoded])
        ids.tofile(work / f"{name}.train.u16")
        print(f"{name}: {len(ids) / 1e6:.2f} M tokens", flush=True)
    (work / "prepared").touch()


def held_out(work: Path) -> HeldOut:
    """What `prepare` kept from training: text by source, and the glossary of the `define` task."""
    return HeldOut(
        json.loads((work / "held_out.json").read_text(encoding="utf-8")),
        json.loads((work / "sources.json").read_text(encoding="utf-8")),
        json.loads((work / "glossary.json").read_text(encoding="utf-8"))["held_out"],
    )


def held_out_windows(work: Path, length: int, per_source: int) -> list[TextWindows]:
    """Held-out windows of `length` tokens, `per_source` of each source."""
    text = held_out(work)
    return cut_windows(text.texts, text.shares, load_tokenizer(work), length, per_source)


def _tokenizer_texts(
    train: dict[str, list[str]], chosen: Sequence[sources.Source], glossary: dict[str, str]
) -> list[str]:
    rng = random.Random(0)
    texts = []
    for source in chosen:
        budget = source.share * 12e6
        for text in rng.sample(train[source.name], len(train[source.name])):
            if budget <= 0:
                break
            texts.append(text[: int(budget)])
            budget -= len(text)
    for kind in tasks.kinds(glossary).values():
        items = [tasks.draw(kind, rng, held_out=False) for _ in range(1500)]
        texts += [f"{item.prompt}\n{item.answer}" for item in items]
    return texts


@dataclass
class Rows:
    """Draws training rows: `text_share` of them are windows of text, the others are packed task items."""

    work: Path
    seq_len: int
    seed: int = 0
    text_share: float = 0.5
    kind_weights: Mapping[str, float] = field(default_factory=lambda: KIND_WEIGHTS)

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.work).backend_tokenizer
        shares: dict[str, float] = json.loads((self.work / "sources.json").read_text(encoding="utf-8"))
        self.streams = {name: np.memmap(self.work / f"{name}.train.u16", dtype=np.uint16) for name in shares}
        self.shares = list(shares.values())
        glossary = json.loads((self.work / "glossary.json").read_text(encoding="utf-8"))["train"]
        self.kinds = tasks.kinds(glossary)
        self.weights = [self.kind_weights.get(name, OTHER_KIND_WEIGHT) for name in self.kinds]

    def batch(self, step: int, part: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels, both int64 [num_rows, seq_len]; labels are already shifted, IGNORE where unscored."""
        rng = random.Random(f"{self.seed}/{step}/{part}")
        rows = [self._text(rng) if rng.random() < self.text_share else self._tasks(rng) for _ in range(num_rows)]
        ids = torch.tensor([row[0] for row in rows])
        labels = torch.tensor([row[1] for row in rows])
        return ids[:, :-1].contiguous(), labels[:, 1:].contiguous()

    def _text(self, rng: random.Random) -> tuple[list[int], list[int]]:
        (name,) = rng.choices(list(self.streams), self.shares)
        start = rng.randrange(len(self.streams[name]) - self.seq_len - 1)
        ids = self.streams[name][start : start + self.seq_len + 1].astype(np.int64).tolist()
        return ids, ids

    def _tasks(self, rng: random.Random) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) <= self.seq_len:
            (name,) = rng.choices(list(self.kinds), self.weights)
            item = tasks.draw(self.kinds[name], rng, held_out=False)
            prompt = self.tokenizer.encode(f"{USER}{item.prompt}{ASSISTANT}").ids
            answer = self.tokenizer.encode(f"{item.answer}{END}").ids
            ids += prompt + answer
            # Prompts are random: their loss is noise that no model can learn away.
            labels += [IGNORE] * len(prompt) + answer
        return ids[: self.seq_len + 1], labels[: self.seq_len + 1]
