"""Answer the tasks with a model: greedy, through its chat template, in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from foreroute.errors import EvaluationError, named
from foreroute.evals.tasks import Item
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.tokenizer_files import default_template

# Extra tokens beyond the right answer, so that an answer that continues is seen to be wrong.
_MORE_TOKENS = 8
_NORMAL_95 = 1.959964


@torch.no_grad()
def answer(
    model: OffloadedModel,
    tokenizer: Any,
    items: Sequence[Item],
    batch: int = 50,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Complete `items` greedily, in their order; prompts of similar length share a `batch`, padded on the left.

    Args:
        tokenizer: of transformers. progress: called with (items done, all items).
    Raises:
        EvaluationError: `model` has no chat template, or it refuses the prompt. PromptError: several, and no default.
    """
    if default_template(tokenizer) is None:
        raise EvaluationError("This model has no chat template to ask through. Evaluate it on text: --text FILE.")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    chats = [[{"role": "user", "content": item.prompt}] for item in items]
    with named("The model's chat template refuses the tasks", EvaluationError):
        prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    longest = [len(tokenizer(item.answer, add_special_tokens=False).input_ids) + _MORE_TOKENS for item in items]
    order = sorted(range(len(items)), key=lambda n: (longest[n], len(prompts[n])))
    completions = [""] * len(items)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        inputs = tokenizer([prompts[n] for n in part], return_tensors="pt", padding=True, add_special_tokens=False)
        output = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=max(longest[n] for n in part),
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
            disable_compile=True,
        )
        for n, ids in zip(part, output[:, inputs.input_ids.shape[1] :], strict=True):
            completions[n] = tokenizer.decode(ids, skip_special_tokens=True)
        progress(start + len(part), len(items))
    return completions


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % interval of right / asked, both ends 0..1: Wilson's score interval, which also holds near 0 and 1."""
    share, z = right / asked, _NORMAL_95
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return max(0.0, middle - half), min(1.0, middle + half)
