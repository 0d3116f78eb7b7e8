"""What people do with a transformers model, they can do with one whose experts are on disk, with the same result."""

import importlib.util
from threading import Thread

import pytest
import torch

from foreroute.model.caches import cache_argument, cache_of
from tests.support.runs import ONE_PROMPT, THREE_PROMPTS, assert_same_bits, generate, make_batch

PROMPT = "Once upon a time"


@pytest.fixture
def folder(checkpoints):
    return checkpoints.get("qwen3_moe")


@pytest.fixture
def model(folder, load):
    return load(folder, "25%")


@pytest.fixture
def reference(folder, references):
    return references.model(folder)


@pytest.fixture
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def evictions_of(model):
    return model.foreroute.stats().evictions


def test_g20_twice_is_the_same(model):
    """What the first run left in the cache changes nothing."""
    first = generate(model)
    between = evictions_of(model)
    assert_same_bits(generate(model), first)
    assert evictions_of(model) > between > 0


def test_g21_sampling_with_a_seed(model, reference):
    def sampled(which, seed):
        torch.manual_seed(seed)
        return generate(which, THREE_PROMPTS, do_sample=True, temperature=1.3, top_p=0.9)

    assert_same_bits(sampled(model, 7), sampled(reference, 7))
    assert sampled(model, 8).tokens.tolist() != sampled(model, 7).tokens.tolist()
    assert evictions_of(model) > 0


def test_g22_beams(model, reference):
    ours, theirs = (
        generate(which, ONE_PROMPT, 12, num_beams=3, num_return_sequences=2) for which in (model, reference)
    )
    assert_same_bits(ours, theirs)
    assert ours.tokens.shape[0] == 2
    assert ours.tokens.tolist() != generate(model, ONE_PROMPT, 12).tokens.repeat(2, 1).tolist()


def test_g23_several_sequences_of_one_prompt(model, reference):
    def sampled(which):
        torch.manual_seed(3)
        return generate(which, ONE_PROMPT, 12, do_sample=True, num_return_sequences=3)

    ours = sampled(model)
    assert_same_bits(ours, sampled(reference))
    assert len({tuple(row) for row in ours.tokens.tolist()}) == 3


def test_g24_plain_forward(model, reference):
    """No cache, no generate: logits of all positions, and a loss."""
    ours, theirs = (which(ONE_PROMPT.ids, labels=ONE_PROMPT.ids, use_cache=False) for which in (model, reference))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    assert model.foreroute.stats().prefill.misses > 0


def test_g24_router_logits_and_hidden_states(model, reference):
    """What transformers records on the way is recorded as ever."""
    options = {"output_router_logits": True, "output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        ours, theirs = (which(ONE_PROMPT.ids, **options) for which in (model, reference))
    assert len(ours.router_logits) == 3
    for name in ("router_logits", "hidden_states"):
        assert all(torch.equal(left, right) for left, right in zip(ours[name], theirs[name], strict=True))


def test_g24_embeddings_as_input(model, reference):
    def run(which):
        embedded = which.get_input_embeddings()(ONE_PROMPT.ids)
        return which.generate(inputs_embeds=embedded, attention_mask=ONE_PROMPT.mask, max_new_tokens=8, do_sample=False)

    assert run(model).tolist() == run(reference).tolist()
    assert model.foreroute.stats().prefill.tokens == ONE_PROMPT.ids.numel()


def test_g25_pipeline(model, reference, tokenizer):
    from transformers import pipeline

    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    prompts = [PROMPT, "Twice"]
    ours, theirs = (
        pipeline("text-generation", model=which, tokenizer=tokenizer)(prompts, batch_size=2, **options)
        for which in (model, reference)
    )
    assert ours == theirs
    assert evictions_of(model) > 0


def test_g26_text_streamer(model, reference, tokenizer, capsys):
    from transformers import TextStreamer

    inputs = tokenizer(PROMPT, return_tensors="pt")
    printed = []
    for which in (model, reference):
        which.generate(**inputs, max_new_tokens=8, do_sample=False, streamer=TextStreamer(tokenizer))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].startswith(PROMPT)


def test_g26_streaming_from_a_thread(model, reference, tokenizer):
    from transformers import TextIteratorStreamer

    inputs = tokenizer(PROMPT, return_tensors="pt")
    expected = reference.generate(**inputs, max_new_tokens=8, do_sample=False)
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    options = {**inputs, "max_new_tokens": 8, "do_sample": False, "streamer": streamer}
    thread = Thread(target=model.generate, kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(expected[0])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: pip install foreroute[eval]")
def test_g27_lm_eval(model, reference, tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [(PROMPT, " there was"), (PROMPT, " nothing"), ("", "a"), ("The capital of", " France is Paris")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    ours, theirs = (
        HFLM(pretrained=which, tokenizer=tokenizer, batch_size=2).loglikelihood(requests, disable_tqdm=True)
        for which in (model, reference)
    )
    assert ours == theirs
    assert len({score for score, _ in ours}) == len(pairs)
    assert model.foreroute.stats().prefill.demand_loads > model.foreroute.plan.num_slots


def test_g28_two_models_take_turns(checkpoints, references, load):
    """One class, two sets of weights, and a third family beside them: token by token, none disturbs another."""
    folders = [checkpoints.get("qwen3_moe"), checkpoints.get("qwen3_moe", seed=5), checkpoints.get("gpt_oss")]
    batch = make_batch(6)
    expected = [references.output(folder, ONE_PROMPT) for folder in folders]
    assert expected[0].tokens.tolist() != expected[1].tokens.tolist()
    models = [load(folder, "25%") for folder in folders]
    steps = [stepwise(model, ONE_PROMPT.ids) for model in models]
    for position in range(ONE_PROMPT.ids.shape[1], ONE_PROMPT.ids.shape[1] + 16):
        for made, whole in zip(steps, expected, strict=True):
            assert next(made) == int(whole.tokens[0, position])
    models[0].foreroute.close()
    assert_same_bits(generate(models[1], batch), generate(references.model(folders[1]), batch))


@torch.no_grad()
def stepwise(model, ids):
    """Greedy tokens, one per `next`."""
    past = None
    while True:
        out = model(ids, **cache_argument(past), use_cache=True)
        past, ids = cache_of(out), out.logits[:, -1:].argmax(-1)
        yield int(ids)


def test_g29_two_threads_of_compute(load, references, tmp_path, monkeypatch):
    """Products large enough that torch divides them: the same team gives the same bits."""
    from tests.support.checkpoints import random_model, save_checkpoint
    from tests.support.families import FAMILIES

    config = FAMILIES["qwen3_moe"]()
    config.hidden_size, config.moe_intermediate_size, config.num_experts = 256, 512, 8
    folder = save_checkpoint(random_model(config, 2), tmp_path / "wide")
    batch = make_batch(64, 40)
    torch.set_num_threads(2)
    try:
        model = load(folder, "80%")
        views, teams = model.foreroute.engine.kernels[0].views, set()
        operands = views.operands

        def noting(layer, slot):
            teams.add(torch.get_num_threads())
            return operands(layer, slot)

        monkeypatch.setattr(views, "operands", noting)
        ours, theirs = (generate(which, batch, 2) for which in (model, references.model(folder)))
    finally:
        torch.set_num_threads(1)
    assert_same_bits(ours, theirs)
    assert teams == {2}
    assert evictions_of(model) > 0
