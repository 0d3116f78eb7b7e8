"""A model that is loaded under one of torch's modes and used under another says what it says under none."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import foreroute
from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Finished, NewToken, Request, Sampling
from foreroute.errors import RefusedError
from foreroute.generation.generate import generate
from foreroute.generation.prefix_cache import PromptCache
from foreroute.model import torch_modes
from foreroute.model.text import load_tokenizer
from tests.batching.test_engine import Heard
from tests.support.conversations import Words, longer
from tests.support.runs import ONE_PROMPT, assert_same_bits
from tests.support.runs import generate as output_of


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "default_cpu": lambda: default_device("cpu"),
    # Stands for a GPU: what is made there by mistake cannot be used.
    "default_meta": lambda: default_device("meta"),
}
LOADS = {**MODES, "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints.get("qwen3_moe")


@pytest.fixture(scope="module")
def plain(folder):
    model = foreroute.load(folder, "30%", config=foreroute.EngineConfig(packed="no"))
    yield model
    model.foreroute.close()


@pytest.fixture(scope="module")
def expected(references, folder):
    return references.output(folder, ONE_PROMPT)


@pytest.mark.parametrize("mode", LOADS.values(), ids=LOADS)
def test_loaded_under_a_mode_and_used_without(mode, plain, load, folder, expected):
    with mode():
        model = load(folder, "30%", packed="no")
    assert model.foreroute.plan == plain.foreroute.plan
    assert not any(parameter.is_inference() for parameter in model.parameters())
    for _ in range(2):
        assert_same_bits(output_of(model), expected)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_used_under_a_mode_and_without(mode, load, folder, expected):
    model = load(folder, "30%", packed="no")
    for use in (mode, contextlib.nullcontext, mode):
        with use():
            assert_same_bits(output_of(model), expected)
    assert model.foreroute.stats().decode.prefetch_used, "nothing was guessed: the test shows little"


@pytest.mark.parametrize("mode", [MODES["inference"], MODES["float64"]], ids=["inference", "float64"])
def test_loaded_and_used_under_a_mode(mode, load, folder, expected):
    with mode():
        model = load(folder, "30%", packed="no")
        assert_same_bits(output_of(model), expected)
    assert_same_bits(output_of(model), expected)


def test_what_is_kept_from_an_answer_serves_the_next_under_any_mode(load, folder):
    def chat(model: Any, first: Any, second: Any) -> list[Any]:
        kept, options = PromptCache(), {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
        with first():
            one = generate(model, Words(), ONE_PROMPT.ids, reuse=kept, **options)
        with second():
            two = generate(model, Words(), longer(ONE_PROMPT.ids, one), reuse=kept, **options)
        assert two.prompt_tokens_reused
        return [one.token_ids, two.token_ids]

    model = load(folder, "30%", packed="no")
    expected = chat(model, contextlib.nullcontext, contextlib.nullcontext)
    assert chat(model, torch.inference_mode, contextlib.nullcontext) == expected
    assert chat(model, contextlib.nullcontext, torch.inference_mode) == expected


def test_what_pages_for_itself_may_be_made_under_a_mode(load, checkpoints):
    folder, tokens = checkpoints.get("qwen3_moe"), []
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    for mode in (contextlib.nullcontext, *MODES.values()):
        model = load(folder, "50%", control="device", packed="no")
        with mode():
            tokens.append(generate(model, Words(), ONE_PROMPT.ids, **options).token_ids)
        tokens.append(generate(model, Words(), ONE_PROMPT.ids, **options).token_ids)
    assert len(set(tokens)) == 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradients_are_as_they_were_after_what_is_kept(mode):
    for fails in (False, True):
        with contextlib.suppress(KeyError), mode(), torch_modes.kept():
            kept = torch.zeros(3).add_(2)
            if fails:
                raise KeyError
        assert not kept.is_inference()
        x = torch.ones(3, requires_grad=True)
        (x * kept).sum().backward()
        assert x.grad.tolist() == [2, 2, 2]
        with torch.inference_mode():
            assert torch.ones(2).is_inference()


def test_no_default_device_is_set_where_none_is_on():
    """It would slow down each operation of each MoE layer."""
    with torch.inference_mode(), torch_modes.kept():
        assert torch._C._len_torch_function_stack() == 0
        assert not torch.ones(1).is_inference()
    with default_device("meta"), torch_modes.kept():
        assert torch.ones(1).device.type == "cpu"


def test_sampling_many_at_once_does_not_read_the_default_dtype(plain, folder):
    heard = []
    for mode in (contextlib.nullcontext, MODES["float16"], MODES["float64"]):
        with mode():
            engine = BatchEngine(plain, load_tokenizer(folder), 64, max_num_seqs=2)
            heard.append(Heard())
            request = Request([5, 6, 7], 8, Sampling(temperature=1e-10, top_p=0.9, seed=3), ignore_eos=True)
            engine.submit(request, heard[-1])
            heard[-1].wait()
            engine.close()
    assert isinstance(heard[0].end, Finished)
    assert heard[0].end.reason == "length"
    assert len({tuple(event.token_id for event in one.events if isinstance(event, NewToken)) for one in heard}) == 1


CALLS = {
    "generate": output_of,
    "model": lambda model: model(ONE_PROMPT.ids),
    "stack": lambda model: model.model(ONE_PROMPT.ids),
    "layer": lambda model: model.model.layers[0].mlp.experts(
        torch.zeros(1, 64), torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3)
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_refused_and_leaves_nothing_behind(call, dtype, plain, expected):
    with torch.autocast("cpu", dtype), pytest.raises(RefusedError, match=r"autocast.*dtype="), torch.no_grad():
        call(plain)
    # That of another device, or one that is switched off, changes nothing here.
    with torch.autocast("cpu", dtype, enabled=False), torch.no_grad():
        call(plain)
    assert_same_bits(output_of(plain), expected)


def test_another_number_of_threads_between_steps_changes_no_token(plain, expected):
    def widen(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        torch.set_num_threads(1 + ids.shape[1] % 2)
        return scores

    before = torch.get_num_threads()
    try:
        found = output_of(plain, logits_processor=[widen])
    finally:
        torch.set_num_threads(before)
    assert found.tokens.tolist() == expected.tokens.tolist()
