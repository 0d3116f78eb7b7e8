"""Prompts that cannot be run."""

import pytest
import torch

from foreroute.errors import PromptError
from foreroute.model.caches import cache_argument, cache_of
from tests.support.families import CONTEXT, FAMILIES
from tests.support.runs import ONE_PROMPT, Batch, assert_same_bits, generate, make_batch, watch_reads


def refused(model, *fragments, **call):
    with watch_reads() as reads, pytest.raises(PromptError) as caught:
        model(**call)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert not reads.paths


@pytest.mark.parametrize("family", FAMILIES)
def test_longer_than_the_context(checkpoints, load, family):
    model, long = load(checkpoints.get(family)), make_batch(CONTEXT + 1)
    refused(model, f"{CONTEXT + 1} tokens", f"context {CONTEXT}", "Shorten", input_ids=long.ids)
    with pytest.raises(PromptError):
        generate(model, long)
    fits = make_batch(CONTEXT)
    assert model(fits.ids).logits.shape[1] == CONTEXT


def test_longer_with_what_the_cache_holds(checkpoints, references, load):
    """A chat's next turn: the cache counts."""
    folder = checkpoints.get("qwen3_moe")
    model, first = load(folder), make_batch(CONTEXT - 10)
    cache = cache_of(model(first.ids, use_cache=True))
    refused(model, f"{CONTEXT + 2} tokens", input_ids=make_batch(12).ids, **cache_argument(cache))
    tail = make_batch(10)
    assert model(tail.ids, **cache_argument(cache)).logits.shape[1] == 10


def test_as_embeddings(checkpoints, load):
    model = load(checkpoints.get("olmoe"))
    refused(model, "context", inputs_embeds=torch.zeros(1, CONTEXT + 1, 64))


@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (0, 0), (3, 0)])
def test_empty(checkpoints, references, load, shape):
    folder = checkpoints.get("qwen3_moe")
    model = load(folder)
    empty = torch.zeros(shape, dtype=torch.int64)
    refused(model, "empty", input_ids=empty)
    if shape != (3, 0):  # there transformers' own generate trips over the padding that it looks for
        with pytest.raises(PromptError, match="empty"):
            generate(model, Batch(empty, empty))
    assert_same_bits(generate(model), references.output(folder, ONE_PROMPT))
