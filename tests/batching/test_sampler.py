"""The engine that answers one by one: texts that end an answer, draws, and requests that are given up."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Finished, PromptScored, Request, Sampling, Step
from foreroute.batching.sampler import Sampler, StopText
from foreroute.cli.commands import demo
from foreroute.errors import ContextLengthError, QueueFullError
from foreroute.model.text import load_tokenizer

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


def draws(logits: list[float], count: int = 200, **asked: Any) -> list[int]:
    settings = SimpleNamespace(do_sample=False, temperature=1.0, top_p=1.0, repetition_penalty=1.0)
    sampler = Sampler(Sampling(**{"seed": 1, "temperature": 1.0, **asked}), (0,), settings)
    return [sampler.draw(torch.tensor(logits)) for _ in range(count)]


@pytest.mark.parametrize("temperature", [1e-8, 1e-10, 1e-40, 5e-324])
def test_a_temperature_next_to_nought_takes_the_likeliest(temperature: float) -> None:
    assert set(draws([3.0, 2.0, 40.0, -9.0], temperature=temperature)) == {2}
    # And those that are as likely, by chance: nought itself takes the first.
    assert set(draws([3.0, 40.0, 40.0, -9.0], temperature=temperature)) == {1, 2}
    # After the least penalty that a request may have.
    assert set(draws([80.0, -80.0], 1, temperature=temperature, repetition_penalty=0.01)) == {0}


def test_draws() -> None:
    logits = [3.0, 2.0, 1.0, -9.0]
    assert set(draws(logits)) == {0, 1, 2}
    assert draws(logits) == draws(logits) != draws(logits, seed=2)
    assert set(draws(logits, temperature=0.0)) == {0}
    assert set(draws(logits, top_k=2)) == {0, 1}
    assert set(draws(logits, top_p=0.5)) == {0}
    assert set(draws(logits, min_p=0.3)) == {0, 1}
    assert set(draws(logits, temperature=0.0, logit_bias={3: 100.0})) == {3}
    # Each token that came is less likely than before.
    assert draws([3.0, 2.9, 2.8], 3, temperature=0.0, presence_penalty=1.0) == [0, 1, 2]
    assert draws([3.0, 2.9], 4, temperature=0.0, frequency_penalty=1.0) == [0, 1, 0, 1]
    # The prompt (token 0) counts for the repetition penalty alone.
    assert draws([3.0, 2.9, 2.0], 1, temperature=0.0, repetition_penalty=1.5) == [1]


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
    steps = [event for event in events if isinstance(event, Step)]
    assert steps[0].token_id == int(logprobs[-1].argmax()) == steps[0].top[0][0]
    assert steps[0].logprob == pytest.approx(float(logprobs[-1].max()), abs=1e-5)
    plain = [event.token_id for event in answered(engine, Request(ids, 3)) if isinstance(event, Step)]
    assert plain == [step.token_id for step in steps]


def test_limits_and_cancelling(engine: BatchEngine) -> None:
    with pytest.raises(ContextLengthError, match=r"64 tokens; 65 .*60 of the"):
        engine.submit(Request([1] * 60, 5), print)
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
