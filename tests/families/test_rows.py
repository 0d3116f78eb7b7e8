"""Rows of different lengths share steps in every family that can: each has the logits that it has alone."""

from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.batching.rows import OneRow, RowsCache, can_be_padded, why_not_batched
from foreroute.errors import ReadError
from foreroute.memory.serving import keeps_prompts
from foreroute.model.caches import CACHE_NAME, cache_argument, cache_of
from tests.families.checks import load_tight, save_tiny
from tests.families.installed import Family
from tests.families.special import AT_ONCE, NOT_PADDED, ONE_ROW, UNGUESSED
from tests.families.test_families import WORKING, by_name

ATOL = 1e-4
# Of transformers' code before a cache was called so: states of linear attention are not continued with it.
IS_OLDER = CACHE_NAME == "past_key_values"
PROMPTS = ([5, 9, 13], list(range(6, 25)), [17, 4, 21, 8, 30, 11, 3])
MOST_AT_ONCE, NUM_STEPS = 8, 6


def not_padded(without: Container[str] = ()) -> list[Any]:
    named = [one for one in WORKING if one.model_type in NOT_PADDED]
    found: list[Any] = [one for one in named if one.model_type not in without]
    return found or [pytest.param(None, id="none", marks=pytest.mark.skip(reason="transformers has no such family"))]


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    """[vocabulary]: what follows `ids`, computed at once and by themselves."""
    return model(input_ids=torch.tensor([ids])).logits[0, -1].float()


@pytest.fixture
def model_of(tmp_path: Path, _torch_setup: None):
    opened = []

    def load(family: Family) -> Any:
        opened.append(load_tight(save_tiny(family, tmp_path / family.model_type)))
        return opened[-1]

    yield load
    for model in opened:
        model.foreroute.close()


@pytest.mark.parametrize("family", [one for one in WORKING if one.model_type not in ONE_ROW | NOT_PADDED], ids=by_name)
def test_rows_are_what_they_are_alone(model_of: Any, family: Family) -> None:
    """Prompts in chunks, short ones padded; some decode while others' prompts are computed."""
    model = model_of(family)
    assert why_not_batched(model) == ""
    cache, texts, done = RowsCache(model), [list(ids) for ids in PROMPTS], [0] * len(PROMPTS)
    cache.arrange([], [(None, 0)] * len(texts))
    for _ in range(NUM_STEPS):
        chunks = [ids[at : at + MOST_AT_ONCE] for ids, at in zip(texts, done, strict=True)]
        phase = "decode" if max(map(len, chunks)) == 1 else "prefill"
        logits = cache.step(chunks, phase)[:, -1].float()
        done = [at + len(chunk) for at, chunk in zip(done, chunks, strict=True)]
        for row, ids in enumerate(texts):
            if done[row] == len(ids):
                torch.testing.assert_close(logits[row], alone(model, ids), atol=ATOL, rtol=0)
                ids.append(int(logits[row].argmax()))
    assert cache.lengths == done == [len(ids) - 1 for ids in texts]


@pytest.mark.parametrize("family", not_padded(UNGUESSED), ids=by_name)
def test_rows_share_the_steps_of_their_answers(model_of: Any, family: Family) -> None:
    """Prompts one by one, as their rows join; a step that fails leaves rows as they were, and one leaves early.

    Not of muse_spark, whose own code decodes a single row 1.5e-4 away from what it computes at once.
    """
    model = model_of(family)
    assert why_not_batched(model) == ""
    cache, texts = RowsCache(model), [list(ids) for ids in PROMPTS]
    most = 99 if family.model_type in AT_ONCE else MOST_AT_ONCE
    going: list[int] = []
    for row, ids in enumerate(texts):
        prompt = RowsCache(model)
        prompt.arrange([], [(None, 0)])
        for at in range(0, len(ids), most):
            logits = prompt.step([ids[at : at + most]], "prefill")[0, -1].float()
        torch.testing.assert_close(logits, alone(model, ids), atol=ATOL, rtol=0)
        ids.append(int(logits.argmax()))
        cache.append_from(prompt, [0])
        going.append(row)
        for _ in range(2):
            if row == len(texts) - 1:
                fails_in_the_end(model, cache, [texts[one][-1:] for one in going])
            step_of_all(model, cache, texts, going)
    cache.arrange([0, 2], [])
    going.remove(1)
    for _ in range(2):
        step_of_all(model, cache, texts, going)
    assert cache.lengths == [len(texts[one]) - 1 for one in going]


@torch.no_grad()
def decoded_alone(model: Any, ids: list[int], num_prompt: int) -> torch.Tensor:
    """The last logits of a row whose tokens behind its prompt are computed one by one, by the family's own code."""
    out = model(input_ids=torch.tensor([ids[:num_prompt]]), use_cache=True)
    for token in ids[num_prompt:]:
        out = model(input_ids=torch.tensor([[token]]), **cache_argument(cache_of(out)), use_cache=True)
    return out.logits[0, -1].float()


def step_of_all(model: Any, cache: RowsCache, texts: list[list[int]], going: list[int]) -> None:
    logits = cache.step([texts[row][-1:] for row in going], "decode")[:, -1].float()
    for one, row in zip(logits, going, strict=True):
        expected = alone(model, texts[row])
        if float((one - expected).abs().max()) > ATOL:
            # Some families' own code decodes a row a little away from what it computes at once, on some processors.
            expected = decoded_alone(model, texts[row], len(PROMPTS[row]))
        torch.testing.assert_close(one, expected, atol=ATOL, rtol=0)
        texts[row].append(int(one.argmax()))


def fails_in_the_end(model: Any, cache: RowsCache, tokens: list[list[int]]) -> None:
    """A step whose last logits cannot be computed: every layer's cache has been written."""

    def failing(*args: Any) -> Any:
        raise ReadError("the disk is gone")

    hook = model.get_output_embeddings().register_forward_pre_hook(failing)
    with pytest.raises(ReadError):
        cache.step(tokens, "decode")
    hook.remove()


@pytest.mark.parametrize("family", [one for one in WORKING if one.model_type in ONE_ROW], ids=by_name)
def test_one_row_is_what_the_family_computes(model_of: Any, family: Family) -> None:
    """Its prompt at once and then its tokens, in a cache of the family's own, as generate() has it."""
    model = model_of(family)
    assert why_not_batched(model) != ""
    ids, row = list(PROMPTS[2]), OneRow(model)
    written = model.generate(
        torch.tensor([ids]), max_new_tokens=NUM_STEPS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    row.arrange([], [(None, 0)])
    following = ids
    for step in range(NUM_STEPS):
        following = [int(row.step([following], "decode" if step else "prefill")[0, -1].argmax())]
        ids += following
    assert ids == written[0].tolist()


@pytest.mark.parametrize("family", not_padded(), ids=by_name)
def test_padding_is_refused_where_experts_or_states_would_get_it(model_of: Any, family: Family) -> None:
    model = model_of(family)
    assert not can_be_padded(model)
    assert keeps_prompts(model) == (family.model_type not in AT_ONCE and not IS_OLDER)
    cache = RowsCache(model)
    cache.arrange([], [(None, 0)] * 2)
    with pytest.raises(AssertionError, match="leaves padding out"):
        cache.step([[5, 6, 7], [8, 9]], "prefill")


@pytest.mark.skipif(IS_OLDER, reason="an older transformers has fewer families")
def test_most_families_share_steps() -> None:
    assert len([one for one in WORKING if one.model_type not in ONE_ROW]) >= 55
