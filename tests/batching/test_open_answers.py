"""Answers without max_tokens have what is free; and the model's own generation settings hold for every request."""

from typing import Any

import pytest
import torch

import foreroute
from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Request, Sampling
from foreroute.cli.commands import demo
from foreroute.config import EngineConfig
from foreroute.generation.generate import generate
from foreroute.model.text import load_tokenizer
from tests.batching.test_engine import Heard

KV = 256


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(demo.find_model())


@pytest.fixture(scope="module")
def tiny() -> Any:
    model = foreroute.load(demo.find_model(), "50%", dtype="float32", config=EngineConfig(packed="no"))
    yield model
    model.foreroute.close()


@pytest.fixture
def engine(tiny: Any, tokenizer: Any) -> Any:
    made = BatchEngine(tiny, tokenizer, KV, max_num_seqs=8, kv_tokens=KV)
    yield made
    made.close()


@pytest.fixture
def ids(tokenizer: Any) -> list[int]:
    return list(tokenizer("def read_lines(path):")["input_ids"])


def ask(engine: BatchEngine, ids: list[int], new: int | None = None, **more: Any) -> Heard:
    heard = Heard()
    engine.submit(Request(ids, new, Sampling(temperature=0.0), ignore_eos=True, **more), heard)
    return heard


def test_alone_an_open_answer_has_the_whole_context(engine: Any, ids: list[int]) -> None:
    heard = ask(engine, ids).wait()
    assert (heard.end.reason, len(ids) + len(heard.tokens)) == ("length", KV)


def test_open_answers_never_hold_more_than_the_cache(tiny: Any, tokenizer: Any, ids: list[int]) -> None:
    """And none of them is cut for that: where room is short, they wait for each other (test_room.py)."""
    engine, most = BatchEngine(tiny, tokenizer, 64, max_num_seqs=8, kv_tokens=64), []

    class Watching(Heard):
        def __call__(self, event: Any) -> None:
            most.append(engine.state().kv_blocks_used)
            super().__call__(event)

    heard = [Watching() for _ in range(3)]
    try:
        for one in heard:
            engine.submit(Request(ids, None, Sampling(temperature=0.0), ignore_eos=True), one)
        assert [(len(ids) + len(one.wait().tokens), one.end.reason) for one in heard] == [(64, "length")] * 3
    finally:
        engine.close()
    assert max(most) <= 64


def test_a_limit_that_was_asked_for_holds(engine: Any, ids: list[int]) -> None:
    assert len(ask(engine, ids, 70).wait().tokens) == 70


@pytest.mark.parametrize(
    "own",
    [
        {"top_k": 2, "do_sample": True}, {"top_k": 50, "min_p": 0.3, "do_sample": True}, {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [202, 203, 5]}, {"begin_suppress_tokens": [202]}, {"eos_token_id": [4, 203]},
        {"stop_strings": ["path"]}, {"min_new_tokens": 20},
        {"bad_words_ids": [[202]]}, {"sequence_bias": [[[300], 9.0]]},
        {"exponential_decay_length_penalty": [5, 1.5]}, {"repetition_penalty": 1.5}, {"forced_eos_token_id": 4},
    ],
    ids=lambda own: next(iter(own)),
)  # fmt: skip
def test_the_models_own_settings_hold(
    tiny: Any, engine: Any, tokenizer: Any, ids: list[int], own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in own.items():
        monkeypatch.setattr(tiny.generation_config, name, value)
    made = BatchEngine(tiny, tokenizer, KV, kv_tokens=KV)
    try:
        heard = Heard()
        made.submit(Request(ids, 24, Sampling(seed=3)), heard)
        torch.manual_seed(3)
        report = generate(tiny, tokenizer, torch.tensor([ids]), max_new_tokens=24)
        assert heard.wait().tokens == list(report.token_ids)
        assert heard.end.reason == report.finish_reason
    finally:
        made.close()


@pytest.mark.parametrize(("name", "value", "length"), [("max_new_tokens", 7, 7), ("max_time", 1e-9, 1)])
def test_the_models_own_limit_ends_an_open_answer(
    tiny: Any, engine: Any, ids: list[int], name: str, value: Any, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.generation_config, name, value)
    heard = ask(engine, ids).wait()
    assert (heard.end.reason, len(heard.tokens)) == ("length", length)
    if name == "max_new_tokens":
        assert len(ask(engine, ids, 12).wait().tokens) == 12, "what a request asks for goes before it"
