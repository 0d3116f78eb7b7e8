"""Chunks, prompts that begin alike, and the lean loop: tokens and bits of a resident model that was fed the same."""

import pytest
import torch
from transformers import GenerationMixin

from foreroute.engine.chunks import split_prompt
from foreroute.errors import ReadError
from foreroute.generation.prefix_cache import PromptCache
from tests.support.conversations import NEW_TOKENS, PROMPT, answer, assert_same, empty_cache, fed, longer
from tests.support.families import FAMILIES
from tests.support.runs import make_batch

THREE_FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3"]
DTYPES = ["fp32", "bf16"]


@pytest.fixture
def pair(checkpoints, references, load):
    def loaded(family, dtype="fp32", **options):
        folder = checkpoints.get(family, dtype)
        return load(folder, "25%", **options), references.model(folder)

    return loaded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_g50_the_lean_loop_says_what_generate_says(pair, family, dtype):
    model, reference = pair(family, dtype)
    for sampling in ({}, {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2}):
        torch.manual_seed(3)
        report, _ = answer(model, PROMPT, 24, **sampling)
        torch.manual_seed(3)
        expected = reference.generate(PROMPT, max_new_tokens=24, **{"do_sample": False, **sampling})
        assert list(report.token_ids) == expected[0, PROMPT.shape[1] :].tolist()
        assert report.loop == "lean"
    assert model.foreroute.stats().evictions > 0


def test_g50_every_end_is_generates_end(pair):
    """An end token, a time limit and the least number of tokens are transformers' criteria and processors."""
    model, reference = pair("qwen3_moe")
    tokens = list(answer(model, PROMPT)[0].token_ids)
    ends = {"eos_token_id": [tokens[4], tokens[7]], "pad_token_id": 0}
    lengths = []
    for options in (ends, {**ends, "min_new_tokens": 7}, {"max_time": 0.0}):
        ours = list(answer(model, PROMPT, **options)[0].token_ids)
        lengths.append(len(ours))
        theirs = reference.generate(PROMPT, do_sample=False, max_new_tokens=NEW_TOKENS, **options)
        assert ours == theirs[0, PROMPT.shape[1] :].tolist()
    assert lengths[0] == 5
    assert lengths[1] >= 7
    assert lengths[2] == 1


def test_g51_what_the_lean_loop_does_not_understand_generate_does(pair, monkeypatch):
    model, reference = pair("qwen3_moe")
    expected = reference.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False)[0, PROMPT.shape[1] :].tolist()
    kept = PromptCache()
    for _ in range(2):
        report, _ = answer(model, PROMPT, cache_implementation="dynamic", reuse=kept)
        assert (list(report.token_ids), report.loop, report.prompt_tokens_reused) == (expected, "generate", 0)
    assert len(kept) == 0

    def own_way(self, *args, **kwargs):
        return GenerationMixin.prepare_inputs_for_generation(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", own_way, raising=False)
    report, _ = answer(model, PROMPT, prefill_chunk=5)
    assert (list(report.token_ids), report.loop, report.stats.prefill.steps) == (expected, "generate", 1)


def test_g51_generates_own_loop_takes_chunks_too(pair):
    model, reference = pair("qwen3_moe")
    report, seen = answer(model, PROMPT, cache_implementation="dynamic", prefill_chunk=11)
    # 23 = 2 x 11 + 1 would leave a single token over.
    pieces = torch.split(PROMPT, 10, dim=1)
    assert_same((report, seen), *fed(reference, pieces, empty_cache(reference)))
    assert (report.loop, report.stats.prefill.steps, report.stats.decode.steps) == ("generate", 3, NEW_TOKENS - 1)


@pytest.mark.parametrize("chunk", [5, 11])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*THREE_FAMILIES, "gpt_oss"])
def test_g52_a_prompt_in_chunks(pair, family, dtype, chunk):
    model, reference = pair(family, dtype)
    ours = answer(model, PROMPT, prefill_chunk=chunk)
    pieces = split_prompt(PROMPT, chunk)
    assert_same(ours, *fed(reference, pieces, empty_cache(reference)))
    stats = ours[0].stats
    assert (stats.prefill.steps, stats.prefill.tokens, stats.decode.steps) == (len(pieces), 23, NEW_TOKENS - 1)
    assert [piece.shape[1] for piece in pieces] == {5: [5, 5, 5, 5, 3], 11: [11, 10, 2]}[chunk]
    assert stats.evictions > 0
    if dtype == "fp32":
        whole = answer(model, PROMPT)
        assert whole[0].stats.prefill.steps == 1
        assert whole[0].token_ids == ours[0].token_ids
        torch.testing.assert_close(ours[1], whole[1], rtol=0, atol=1e-3)


def test_g52_the_chunk_is_what_the_model_was_loaded_with(pair):
    model, _ = pair("qwen3_moe", prefill_chunk=8)
    assert answer(model, PROMPT)[0].stats.prefill.steps == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*THREE_FAMILIES, "gpt_oss"])
def test_g53_a_conversation_goes_on(pair, family, dtype):
    """Even where a window has slid: everything that was kept is a beginning of the next prompt."""
    model, reference = pair(family, dtype)
    kept, cache, ids, pieces, known = PromptCache(), empty_cache(reference), PROMPT, [PROMPT], 0
    for turn in range(3):
        ours = answer(model, ids, reuse=kept)
        assert_same(ours, *fed(reference, pieces, cache))
        report = ours[0]
        assert report.prompt_tokens_reused == known
        assert report.stats.prefill.tokens == ids.shape[1] - known
        # The last token was chosen and not computed.
        known = ids.shape[1] + NEW_TOKENS - 1
        ids = longer(ids, report, seed=turn)
        pieces = [ids[:, known:]]
        assert 0 < report.prompt_cache_bytes == kept.nbytes
    assert len(kept) == (3 if family == "gpt_oss" else 1)
    assert model.foreroute.stats().evictions > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", THREE_FAMILIES)
def test_g54_two_prompts_share_a_beginning(pair, family, dtype):
    """The kept cache is cut to it, and goes on being what it was for a third prompt."""
    model, reference = pair(family, dtype)
    kept = PromptCache()
    first = answer(model, PROMPT, reuse=kept)
    other = torch.cat([PROMPT[:, :15], make_batch(9, seed=8).ids], dim=1)

    def beginning(length):
        cache = empty_cache(reference)
        fed(reference, [PROMPT], cache)
        cache.crop(length - cache.get_seq_length())
        return cache

    ours = answer(model, other, reuse=kept)
    assert_same(ours, *fed(reference, [other[:, 15:]], beginning(15)))
    assert ours[0].prompt_tokens_reused == 15
    again = answer(model, PROMPT, reuse=kept)
    assert_same(again, *fed(reference, [PROMPT[:, 21:]], beginning(21)))
    # Two tokens at least are computed: one alone would be decoded.
    assert (again[0].prompt_tokens_reused, again[0].stats.prefill.tokens) == (21, 2)
    longer_ids = longer(PROMPT, again[0])
    assert answer(model, longer_ids, reuse=kept)[0].prompt_tokens_reused == 23 + NEW_TOKENS - 1
    assert len(first[1]) == NEW_TOKENS


def test_g54_what_has_left_a_window_is_not_called_back(pair):
    model, reference = pair("gpt_oss")
    kept = PromptCache()
    short = PROMPT[:, :4]
    answer(model, short, 3, reuse=kept)
    # 6 tokens are kept of a window of 8: they can still be cut.
    other = torch.cat([short[:, :3], make_batch(6, seed=8).ids], dim=1)
    assert answer(model, other, reuse=kept)[0].prompt_tokens_reused == 3
    kept.clear()
    answer(model, PROMPT, reuse=kept)
    ours = answer(model, other, reuse=kept)
    assert_same(ours, *fed(reference, [other], empty_cache(reference)))
    assert answer(model, torch.cat([PROMPT[:, :15], other], dim=1), reuse=kept)[0].prompt_tokens_reused == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ReadError("the disk is gone")], ids=["ctrl-c", "read error"])
def test_g55_an_answer_cut_off_in_mid_step_leaves_what_is_certain(pair, family, error, monkeypatch):
    model, reference = pair(family)
    kept = PromptCache()
    compute, calls = model.foreroute.engine.compute, []

    def failing(layer, *args):
        calls.append(layer)
        if len(calls) == 4 * FAMILIES[family]().num_hidden_layers + 2:
            raise error
        return compute(layer, *args)

    monkeypatch.setattr(model.foreroute.engine, "compute", failing)
    tokens, _ = fed(reference, [PROMPT], empty_cache(reference))
    if error is KeyboardInterrupt:
        report, _ = answer(model, PROMPT, reuse=kept)
        assert (report.finish_reason, list(report.token_ids)) == ("interrupted", tokens[:4])
    else:
        with pytest.raises(ReadError):
            answer(model, PROMPT, reuse=kept)
    monkeypatch.undo()
    # Prompt and three tokens: the step of the fourth was cut off after its first layers.
    following = torch.cat([PROMPT, torch.tensor([tokens[:4]]), make_batch(6, seed=4).ids], dim=1)
    ours = answer(model, following, reuse=kept)
    if family == "gpt_oss":
        assert ours[0].prompt_tokens_reused == 0
        return
    cache = empty_cache(reference)
    fed(reference, [PROMPT], cache, 4)
    assert ours[0].prompt_tokens_reused == cache.get_seq_length() == 26
    assert_same(ours, *fed(reference, [following[:, 26:]], cache))


def test_g56_one_cache_serves_two_models(pair):
    first, _ = pair("qwen3_moe")
    second, reference = pair("mixtral")
    kept = PromptCache()
    answer(first, PROMPT, reuse=kept)
    ours = answer(second, PROMPT, reuse=kept)
    assert ours[0].prompt_tokens_reused == 0
    assert_same(ours, *fed(reference, [PROMPT], empty_cache(reference)))
    assert [answer(which, PROMPT, reuse=kept)[0].prompt_tokens_reused for which in (first, second)] == [21, 21]
