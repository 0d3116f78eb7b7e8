"""However a model is called, a step begins: prompts are exact under every policy, calls are counted and checked."""

import copy
import inspect
import pickle
from contextlib import contextmanager, nullcontext

import pytest
import torch

from foreroute.errors import PromptError, RefusedError
from foreroute.model.caches import CACHE_NAME, cache_argument, cache_of
from tests.support.families import CONTEXT
from tests.support.runs import generate, make_batch, slots_memory

IDS = make_batch(14, seed=3).ids

# What wrappers do (PEFT calls `.forward`), and who wants embeddings (the decoder stack). Each: (model) -> last states.
CALLS = {
    "model": lambda model: model(IDS, output_hidden_states=True).hidden_states[-1],
    "model.forward": lambda model: model.forward(IDS, output_hidden_states=True).hidden_states[-1],
    "stack": lambda model: model.model(IDS).last_hidden_state,
    "stack.forward": lambda model: model.model.forward(input_ids=IDS).last_hidden_state,
    "embeddings": lambda model: model.model(inputs_embeds=model.get_input_embeddings()(IDS)).last_hidden_state,
}


@pytest.fixture
def speculative(load, checkpoints, sidecars):
    """A model in the middle of an approximate answer."""
    model = load(
        checkpoints.get("qwen3_moe"), "25%", predictor=str(sidecars("qwen3_moe")), policy="speculative", prefetch="none"
    )
    generate(model, new_tokens=4)
    return model


@pytest.fixture
def resident(references, checkpoints):
    return references.model(checkpoints.get("qwen3_moe"))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@torch.no_grad()
def test_a_prompt_is_exact_and_counted_however_it_is_called(speculative, resident, call):
    before = speculative.foreroute.stats()
    found, expected = call(speculative), call(resident)
    done = speculative.foreroute.stats().minus(before)
    assert torch.equal(found, expected)
    assert (done.prefill.steps, done.prefill.tokens) == (1, IDS.numel())
    assert (done.decode.steps, done.decode.substituted) == (0, 0)


@pytest.mark.parametrize("stack", [lambda model: model, lambda model: model.model], ids=["model", "stack"])
@torch.no_grad()
def test_a_decoded_token_goes_by_the_policy_however_it_is_called(speculative, stack):
    cache = cache_of(stack(speculative).forward(IDS, use_cache=True))
    before = speculative.foreroute.stats()
    for token in range(20, 40):
        stack(speculative).forward(torch.tensor([[token]]), use_cache=True, **cache_argument(cache))
    decode = speculative.foreroute.stats().minus(before).decode
    assert (decode.steps, decode.tokens) == (20, 20)
    assert decode.substituted > 0


@torch.no_grad()
def test_layers_that_are_called_alone_are_a_prompts(speculative, resident):
    hidden = torch.randn(9, 1, 64, generator=torch.Generator().manual_seed(1)).unbind()
    before = speculative.foreroute.stats()
    for states in hidden:
        for ours, theirs in zip(speculative.model.layers, resident.model.layers, strict=True):
            assert torch.equal(ours.mlp(states[None]), theirs.mlp(states[None]))
    done = speculative.foreroute.stats().minus(before)
    assert (done.prefill.steps, done.prefill.tokens, done.decode.substituted) == (9, 9, 0)
    # And what follows begins a step of its own.
    assert torch.equal(CALLS["stack"](speculative), CALLS["stack"](resident))


@pytest.mark.parametrize("call", [lambda model, ids: model(ids), lambda model, ids: model.forward(input_ids=ids),
    lambda model, ids: model.model(ids), lambda model, ids: model.model.forward(ids)])  # fmt: skip
def test_the_context_is_checked_however_it_is_called(speculative, call):
    with pytest.raises(PromptError, match=f"{CONTEXT + 1} tokens"):
        call(speculative, torch.ones(1, CONTEXT + 1, dtype=torch.int64))
    with pytest.raises(PromptError, match="empty"):
        call(speculative, torch.ones(1, 0, dtype=torch.int64))
    call(speculative, IDS)


def test_a_call_that_breaks_off_leaves_the_next_one_whole(speculative, resident, monkeypatch):
    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    layer = speculative.model.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(layer.mlp, "forward", fails)
        for call in (speculative, speculative.forward, speculative.model):
            with pytest.raises(KeyboardInterrupt):
                call(IDS)
    for call in CALLS.values():
        with torch.no_grad():
            assert torch.equal(call(speculative), call(resident))


def test_the_stack_refuses_what_the_model_refuses(speculative, tmp_path):
    stack = speculative.model
    for what in (lambda: stack.save_pretrained(tmp_path), stack.half, lambda: stack.to(torch.float16),
                 lambda: stack.train(), lambda: copy.deepcopy(stack), lambda: pickle.dumps(stack)):  # fmt: skip
        with pytest.raises(RefusedError):
            what()
    assert not list(tmp_path.iterdir())
    assert stack.to("cpu") is stack
    assert CACHE_NAME in inspect.signature(stack.forward).parameters


def test_calls_after_close_say_so(speculative):
    cache = cache_of(speculative(IDS, use_cache=True))
    speculative.foreroute.close()
    speculative.foreroute.close()
    for call in (
        lambda: speculative(IDS),
        lambda: speculative.forward(torch.tensor([[5]]), **cache_argument(cache)),
        lambda: speculative.model(IDS),
        lambda: speculative.model.layers[0].mlp(torch.zeros(1, 1, 64)),
        lambda: generate(speculative),
    ):
        with pytest.raises(RefusedError, match="closed"):
            call()


@torch.no_grad()
def test_a_layer_whose_experts_nearly_fill_the_pool_passes_twice(load, checkpoints, resident):
    """More of them are resident than are pinned at once, and slots are free for the others: they are not read again."""
    folder = checkpoints.get("qwen3_moe")
    model = load(folder, slots_memory(folder, 14), prefetch="none")
    hidden, ids = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)), torch.arange(12).view(4, 3)
    weights = torch.full((4, 3), 0.25)
    for _ in range(3):
        found = model.model.layers[0].mlp.experts(hidden, ids, weights)
        assert torch.equal(found, resident.model.layers[0].mlp.experts(hidden, ids, weights))


@pytest.mark.parametrize("policy", ["speculative", "tolerance:0.4", "paper"])
def test_what_was_fitted_is_used_under_any_of_torchs_modes(load, checkpoints, sidecars, policy):
    """Another default dtype or device, inference mode: while loading, or while generating."""
    found, folder = [], checkpoints.get("qwen3_moe")
    for loading in (nullcontext, torch.inference_mode, default_float64):
        with loading():
            model = load(folder, "25%", predictor=str(sidecars("qwen3_moe")), policy=policy, deterministic=True)
        for use in (nullcontext, torch.inference_mode, default_float64, nullcontext):
            model.foreroute.set_policy("exact")
            with use():
                model.foreroute.set_policy(policy)
                before = model.foreroute.stats()
                output = generate(model)
            decode = model.foreroute.stats().minus(before).decode
            found.append((output.tokens.tolist(), decode.substituted > 0 or policy == "paper"))
    assert all(substituted for _, substituted in found)
    # What the pool holds when an answer begins differs; the first answers begin alike.
    assert found[0] == found[4] == found[8]


@contextmanager
def default_float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
