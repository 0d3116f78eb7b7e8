"""What an encoder-decoder is worth: bits per hidden character, right answers, balance and reuse of its routers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foreroute.evals.tasks import Item
from foreroute.evals.text import cut_windows
from models.router_stats import LayerStats, layer_stats
from models.seq2seq.rows import DECODER_LENGTH, ENCODER_LENGTH, TAIL, WINDOW, Batch, hide_spans, hide_tail, padded
from models.tokenizer import VOCAB_SIZE

ROWS, ITEMS = 4, 50  # per forward pass
MORE_TOKENS = 8  # beyond the right answer, so that an answer that continues is seen to be wrong


@dataclass(frozen=True)
class HiddenText:
    """Windows of one source with text hidden, and how many characters are."""

    source: str
    share: float
    batches: list[Batch]
    chars: int


def hide_text(
    texts: Mapping[str, str],
    shares: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase,
    per_source: int,
    tail: bool = False,
) -> list[HiddenText]:
    """Evenly spaced windows of `texts` with random spans hidden (the same every time), or their end."""
    context = ENCODER_LENGTH - 2 + TAIL if tail else WINDOW
    found = []
    for one in cut_windows(texts, shares, tokenizer, context - 1, per_source):
        rng = random.Random(one.source)
        rows = [hide_tail(row) if tail else hide_spans(rng, row) for row in one.ids.tolist()]
        chars = sum(len(tokenizer.decode([n for n in labels[:-1] if n < VOCAB_SIZE])) for _, labels in rows)
        parts = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
        batches = [Batch(*(torch.tensor(side) for side in zip(*part, strict=True))) for part in parts]
        found.append(HiddenText(one.source, one.share, batches, chars))
    return found


@torch.no_grad()
def bits_per_hidden_char(logits: Callable[[Batch], Tensor], hidden: Sequence[HiddenText]) -> dict[str, float]:
    """Bits of the hidden tokens, sentinels not counted, per character of theirs, by source and weighted as "all"."""
    found = {}
    for one in hidden:
        nats = 0.0
        for batch in one.batches:
            losses = torch.nn.functional.cross_entropy(logits(batch).float().flatten(0, 1), batch.labels.flatten(),
                                                       reduction="none")  # fmt: skip
            text = batch.labels.flatten() < VOCAB_SIZE
            text &= torch.arange(DECODER_LENGTH).repeat(len(batch.labels)) < DECODER_LENGTH - 1  # not the end token
            nats += losses[text].sum().item()
        found[one.source] = nats / math.log(2) / one.chars
    weights = {one.source: one.share for one in hidden}
    found["all"] = sum(found[source] * share for source, share in weights.items()) / sum(weights.values())
    return found


def transformers_logits(model: PreTrainedModel) -> Callable[[Batch], Tensor]:
    """Logits of a model of transformers, [rows, decoder length, vocabulary]."""

    def logits(batch: Batch) -> Tensor:
        mask = None if batch.kept is None else batch.kept.long()
        return model(input_ids=batch.ids, attention_mask=mask, decoder_input_ids=batch.decoder_ids).logits

    return logits


def item_rows(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[tuple[list[int], list[int]]]:
    """Encoder ids and labels of items."""
    return [(tokenizer(item.prompt).input_ids, tokenizer(item.answer).input_ids) for item in items]


def item_batches(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[Batch]:
    """Items with their right answers, those of like length together."""
    rows = sorted(item_rows(tokenizer, items), key=lambda row: len(row[0]))
    return [padded(rows[start : start + ITEMS]) for start in range(0, len(rows), ITEMS)]


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[str]:
    """Greedy answers to `items`, in their order."""
    rows = item_rows(tokenizer, items)
    order = sorted(range(len(rows)), key=lambda number: (len(rows[number][1]), len(rows[number][0])))
    answers = [""] * len(rows)
    for start in range(0, len(order), ITEMS):
        part = order[start : start + ITEMS]
        batch = padded([rows[number] for number in part])
        output = model.generate(
            input_ids=batch.ids,
            attention_mask=None if batch.kept is None else batch.kept.long(),
            max_new_tokens=max(len(rows[number][1]) for number in part) + MORE_TOKENS,
            do_sample=False,
            num_beams=1,
        )
        for number, ids in zip(part, output, strict=True):
            answers[number] = tokenizer.decode(ids[1:], skip_special_tokens=True)
    return answers


@torch.no_grad()
def router_stats(model: PreTrainedModel, batches: Sequence[Batch]) -> list[LayerStats]:
    """Statistics of every sparse layer, the encoder's first; tokens that are padding are left out."""
    heard: list[tuple[str, Tensor]] = []
    routers = [(name, one) for name, one in model.named_modules() if type(one).__name__.endswith("Top1Router")]

    def listen(name: str) -> Any:
        return lambda _, __, output: heard.append((name, output[2].argmax(-1)))

    hooks = [router.register_forward_hook(listen(name)) for name, router in routers]
    counts = torch.zeros(len(routers), routers[0][1].num_experts)
    same, pairs = torch.zeros(len(routers)), torch.zeros(len(routers))
    for batch in batches:
        heard.clear()
        transformers_logits(model)(batch)
        for layer, (name, ids) in enumerate(heard):
            real = batch.kept if name.startswith("encoder") else batch.decoded
            real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
            counts[layer] += torch.bincount(ids[real], minlength=counts.shape[1])
            both = real[:, 1:] & real[:, :-1]
            same[layer] += ((ids[:, 1:] == ids[:, :-1]) & both).sum()
            pairs[layer] += both.sum()
    for hook in hooks:
        hook.remove()
    return layer_stats(counts, same / pairs)
