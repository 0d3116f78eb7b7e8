"""The engine that answers one by one: texts that end an answer, draws, and requests that are cancelled."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Finished, NewToken, PromptScored, Request, Sampling
from foreroute.batching.sampler import CountPenalty, Sampler, TokenBias
from foreroute.cli.commands import demo
from foreroute.errors import ContextLengthError, QueueFullError
from foreroute.generation.decode_loop import LeanLoop
from foreroute.model.text import StopText, load_tokenizer
from tests.support.checkpoints import random_model
from tests.support.families import FAMILIES

LETTERS = st.text("ab", max_size=12)


@given(LETTERS, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_text_is_said(text: str, stop: list[str]) -> None:
    stopping = StopText(stop)
    said = ""
    for letter in text:
        said += stopping.push(letter)
        if stopping.is_over:
            break
    else:
        said += stopping.rest()
    ends = [at for at in (text.find(one) for one in stop) if at >= 0]
    assert stopping.is_over == bool(ends)
    assert text.startswith(said)
    assert not any(one in said for one in stop)
    if not ends:
        assert said == text
    else:
        # The first one that was whole; nothing before it is lost.
        whole = min(text.find(one) + len(one) for one in stop if one in text)
        assert any(said + one == text[:whole] for one in stop)


@pytest.fixture(scope="module")
def model(_torch_setup: None) -> Any:
    """A model that is asked for its processors alone."""
    return random_model(FAMILIES["qwen3_moe"](), 0)


@pytest.fixture
def own(model: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Settings of the model's own generation_config."""

    def setting(**values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(model.generation_config, name, value)

    return setting


def draws(model: Any, logits: list[float], count: int = 200, **asked: Any) -> list[int]:
    sampler = Sampler(model, Sampling(**{"seed": 1, "temperature": 1.0, **asked}), (0,), count)
    return [sampler.draw(torch.tensor(logits)) for _ in range(count)]


@pytest.mark.parametrize("temperature", [1e-8, 1e-10, 1e-40, 5e-324])
def test_a_temperature_near_zero_takes_the_likeliest(model: Any, temperature: float) -> None:
    assert set(draws(model, [3.0, 2.0, 40.0, -9.0], temperature=temperature)) == {2}
    # And those that are as likely, by chance: zero itself takes the first.
    assert set(draws(model, [3.0, 40.0, 40.0, -9.0], temperature=temperature)) == {1, 2}
    # After the least penalty that a request may have.
    assert set(draws(model, [80.0, -80.0], 1, temperature=temperature, repetition_penalty=0.01)) == {0}


def test_draws(model: Any) -> None:
    logits = [3.0, 2.0, 1.0, -9.0]
    assert set(draws(model, logits)) == {0, 1, 2}
    assert draws(model, logits) == draws(model, logits) != draws(model, logits, seed=2)
    assert set(draws(model, logits, temperature=0.0)) == {0}
    assert set(draws(model, logits, top_k=2)) == set(draws(model, logits, temperature=2, top_k=2)) == {0, 1}
    assert set(draws(model, logits, top_p=0.5)) == {0}
    assert set(draws(model, logits, min_p=0.3)) == {0, 1}
    assert set(draws(model, logits, temperature=0.0, logit_bias={3: 100.0})) == {3}
    # Each token that came is less likely than before.
    assert draws(model, [3.0, 2.9, 2.8], 3, temperature=0.0, presence_penalty=1.0) == [0, 1, 2]
    assert draws(model, [3.0, 2.9], 4, temperature=0.0, frequency_penalty=1.0) == [0, 1, 0, 1]
    # The prompt (token 0) counts for the repetition penalty alone.
    assert draws(model, [3.0, 2.9, 2.0], 1, temperature=0.0, repetition_penalty=1.5) == [1]


def test_what_a_request_leaves_open_the_model_says(model: Any, own: Callable[..., None]) -> None:
    wide = [2.0 - at / 100 for at in range(80)]
    assert len(set(draws(model, wide, 2000))) > 50, "transformers' default top_k of 50 does not apply"
    own(do_sample=True, temperature=0.5, top_k=2)
    assert set(draws(model, wide, temperature=None)) == {0, 1}
    assert draws(model, wide, temperature=None, top_k=2) == draws(model, wide, temperature=None)
    assert len(set(draws(model, wide, top_k=0))) > 2
    own(top_k=None, min_p=0.9)
    assert set(draws(model, [3.0, 2.0, 1.0])) == {0}
    own(do_sample=False, min_p=None)
    assert draws(model, wide, 3, temperature=None) == [0, 0, 0]
    own(repetition_penalty=1.5)
    assert draws(model, wide, 3, temperature=None) == [1, 2, 3]


class Told:
    """A decoder whose logits are told beforehand: generate()'s own path over any logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._rows = iter(logits)

    def prefill(self, ids: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
        return next(self._rows)[None]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return next(self._rows)[None]


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7}, {"top_p": 0.6}, {"top_k": 5}, {"min_p": 0.2}, {"repetition_penalty": 1.4},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.9}, {"min_tokens": 6},
    {"presence_penalty": 1.5}, {"frequency_penalty": -0.7}, {"logit_bias": {3: 4.0, 7: -100.0}},
    {"frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {9: 3.0}, "repetition_penalty": 1.2,
     "temperature": 1.3, "top_p": 0.95, "min_tokens": 4},
    {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.3, "min_tokens": 12},
]  # fmt: skip
PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {}, "min_tokens": 0}


@pytest.mark.parametrize("asked", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 17])
def test_a_rows_tokens_are_those_of_generate(model: Any, own: Any, asked: dict[str, Any], seed: int) -> None:
    """The same logits, processors and seed: token for token, to the model's own end."""
    generator = torch.Generator().manual_seed(100 + seed)
    logits = torch.randn(12, 256, generator=generator) * 2
    prompt = torch.randint(0, 256, (1, 20), generator=generator)
    own(eos_token_id=4, pad_token_id=0)
    logits[:, 4] += 2.0  # The end comes now and then.
    sampling = Sampling(**{"temperature": 1.0, "seed": seed, **asked})
    sampler = Sampler(model, sampling, prompt[0].tolist(), 12)
    before = logits.clone()
    ours = [sampler.draw(row) for row in logits]
    assert torch.equal(logits, before)

    given = {name: value for name, value in vars(sampling).items() if name not in ("seed", *PENALTIES)}
    told = {name: value for name, value in given.items() if value is not None}
    if told["temperature"] == 0:
        del told["temperature"]
    penalties: list[LogitsProcessor] = []
    if sampling.presence_penalty or sampling.frequency_penalty:
        penalties.append(CountPenalty(sampling.presence_penalty, sampling.frequency_penalty))
    if sampling.logit_bias:
        penalties.append(TokenBias(sampling.logit_bias))
    theirs: list[int] = []
    torch.manual_seed(seed)
    told = {"top_k": 0, **told, "min_new_tokens": sampling.min_tokens, "do_sample": sampling.temperature != 0}
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12,
        custom_generate=LeanLoop(theirs.append, None, None, Told(logits)),
        logits_processor=LogitsProcessorList(penalties), **told,
    )  # fmt: skip
    assert theirs == ours[: len(theirs)]
    assert len(theirs) == 12 or theirs[-1] == 4
    assert 4 not in theirs[: sampling.min_tokens]


def test_penalties_are_openais() -> None:
    """mu - count * frequency - (count > 0) * presence over the answer's tokens, and what is added to some logits."""
    counting, prompt = CountPenalty(0.5, 0.25), torch.tensor([[1, 2, 2]])
    scores = torch.zeros(1, 5)
    assert counting(prompt, scores).tolist() == [[0.0] * 5]
    grown = torch.cat([prompt, torch.tensor([[3, 0, 3, 3]])], 1)
    assert counting(grown, scores).tolist() == [[-0.75, 0.0, 0.0, -1.25, 0.0]]
    assert TokenBias({2: 1.5, 4: -100.0})(grown, scores).tolist() == [[0.0, 0.0, 1.5, 0.0, -100.0]]
    assert not scores.any()


@pytest.fixture
def engine(load: Callable[..., Any]) -> Any:
    made = BatchEngine(
        load(demo.find_model(), "50%", dtype="float32", predictor="no"), load_tokenizer(demo.find_model()), 64, 1, 1
    )
    yield made
    made.close()


def answered(engine: BatchEngine, request: Request) -> list[Any]:
    events: list[Any] = []
    is_over = threading.Event()

    def on_event(event: Any) -> None:
        events.append(event)
        if isinstance(event, Finished):
            is_over.set()

    engine.submit(request, on_event)
    assert is_over.wait(60)
    return events


def test_scores_are_those_of_the_model(engine: BatchEngine) -> None:
    ids = (9, 8, 7, 6, 5)
    events = answered(engine, Request(ids, 3, num_top_logprobs=2, wants_prompt_scores=True))
    scored = next(event for event in events if isinstance(event, PromptScored))
    with torch.no_grad():
        logprobs = engine._model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    assert scored.logprobs[0] is None
    assert scored.logprobs[1:] == pytest.approx([float(logprobs[at, ids[at + 1]]) for at in range(4)], abs=1e-5)
    steps = [event for event in events if isinstance(event, NewToken)]
    assert steps[0].token_id == int(logprobs[-1].argmax()) == steps[0].top[0][0]
    assert steps[0].logprob == pytest.approx(float(logprobs[-1].max()), abs=1e-5)
    plain = [event.token_id for event in answered(engine, Request(ids, 3)) if isinstance(event, NewToken)]
    assert plain == [step.token_id for step in steps]


def test_limits_and_cancelling(engine: BatchEngine) -> None:
    with pytest.raises(ContextLengthError, match=r"64 tokens, and the prompt has 64"):
        engine.submit(Request([1] * 64, 5), print)
    began, ended = threading.Event(), threading.Event()

    def on_event(event: Any) -> None:
        began.set()
        if isinstance(event, Finished):
            assert event.reason == "cancelled"
            ended.set()

    endless = Request([5], 60, Sampling(logit_bias={4: -100.0}))
    handles = [engine.submit(endless, on_event) for _ in range(2)]
    with pytest.raises(QueueFullError):
        engine.submit(endless, on_event)
    assert began.wait(60)
    for handle in handles:
        engine.cancel(handle)
    assert ended.wait(60)
    assert answered(engine, Request([5], 1))[-1].reason == "length"
    assert engine.state().running + engine.state().waiting == 0
