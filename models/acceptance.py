"""How often a draft's greedy token is the one that the model it drafts for would give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from foreroute.evals.tasks import Item
from foreroute.evals.text import TextWindows
from models import attention, experts
from models.tokenizer import ASSISTANT, END, USER

MODELS = Path(__file__).resolve().parent
BATCH = 8


def load(folder: Path) -> PreTrainedModel:
    """A shipped decoder in bf16, with the fast training forward."""
    experts.register()
    attention.register()
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        experts_implementation=experts.IMPLEMENTATION,
        attn_implementation=attention.IMPLEMENTATION,
    ).eval()


@torch.no_grad()
def agreement(draft: PreTrainedModel, target: PreTrainedModel, ids: Tensor, scored: Tensor) -> tuple[int, int]:
    """Positions of ids [rows, length] whose next greedy token is the same in both, of those that `scored` marks."""
    same = 0
    for rows, marks in zip(ids.split(BATCH), scored.split(BATCH), strict=True):
        greedy = [model(input_ids=rows, use_cache=False).logits.argmax(-1) for model in (draft, target)]
        same += int(((greedy[0] == greedy[1]) & marks).sum())
    return same, int(scored.sum())


def on_text(draft: PreTrainedModel, target: PreTrainedModel, windows: Sequence[TextWindows]) -> dict[str, float]:
    """Share of positions where both agree, by source, and "all": their mean weighted by the sources' shares."""
    found = {}
    for one in windows:
        ids = one.ids[:, :-1]
        same, asked = agreement(draft, target, ids, torch.ones_like(ids, dtype=torch.bool))
        found[one.source] = same / asked
    shares = {one.source: one.share for one in windows}
    found["all"] = sum(found[source] * share for source, share in shares.items()) / sum(shares.values())
    return found


def on_tasks(
    draft: PreTrainedModel, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
) -> dict[str, float]:
    """Share of the tokens of right answers where both agree, by kind of task, and "all": their mean."""
    counts: dict[str, list[int]] = {}
    for item in sorted(items, key=lambda one: one.kind):
        prompt = tokenizer(f"{USER}{item.prompt}{ASSISTANT}", add_special_tokens=False).input_ids
        answer = tokenizer(f"{item.answer}{END}", add_special_tokens=False).input_ids
        ids = torch.tensor([prompt + answer[:-1]])
        scored = torch.arange(ids.shape[1])[None] >= len(prompt) - 1
        found = agreement(draft, target, ids, scored)
        counts[item.kind] = [sum(pair) for pair in zip(counts.get(item.kind, [0, 0]), found, strict=True)]
    shares = {kind: same / asked for kind, (same, asked) in counts.items()}
    return {**shares, "all": sum(shares.values()) / len(shares)}
