"""Rows with a grammar beside rows without one: each keeps to its own."""

import json
from typing import Any

import pytest
import torch

pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")
from transformers.generation.logits_process import LogitsProcessorList

import foreroute
from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Request, Sampling
from foreroute.cli.commands import demo
from foreroute.config import EngineConfig
from foreroute.generation.generate import generate
from foreroute.model.text import load_tokenizer
from foreroute.structured.compiler import GrammarCompiler
from foreroute.structured.grammar import Grammar
from foreroute.structured.mask import GrammarMask
from tests.batching.test_engine import Heard

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 10, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(demo.find_model())


@pytest.fixture(scope="module")
def tiny() -> Any:
    model = foreroute.load(demo.find_model(), "25%", dtype="float32", config=EngineConfig(packed="no"))
    yield model
    model.foreroute.close()


@pytest.fixture(scope="module")
def engine(tiny: Any, tokenizer: Any) -> Any:
    made = BatchEngine(tiny, tokenizer, 256, max_num_seqs=6)
    yield made
    made.close()


@pytest.fixture(scope="module")
def compiler(tiny: Any, tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler.of(tiny, tokenizer)


def ask(engine: BatchEngine, ids: list[int], new: int, seed: int, temperature: float = 1.0, **more: Any) -> Heard:
    heard = Heard()
    engine.submit(Request(ids, new, Sampling(temperature=temperature, seed=seed), **more), heard)
    return heard


def text_of(heard: Heard) -> str:
    return "".join(step.text for step in heard.steps) + heard.end.text


def test_free_rows_keep_their_tokens_beside_masked_ones(engine: Any, compiler: Any, tokenizer: Any) -> None:
    prompts = [tokenizer(text)["input_ids"] for text in ("4735 + 281", "def read(path):", "Sort: 31 12 87")]
    grammar = compiler.compile(Grammar.json_schema(SCHEMA))
    alone = [ask(engine, ids, 20, seed=at).wait() for at, ids in enumerate(prompts)]
    masked, free = [], []
    for at, ids in enumerate(prompts):
        masked.append(ask(engine, ids, 80, seed=at, grammar=grammar))
        free.append(ask(engine, ids, 20, seed=at))
    assert [heard.wait().tokens for heard in free] == [heard.tokens for heard in alone]
    for heard in masked:
        assert heard.wait().end.reason == "stop"
        assert set(json.loads(text_of(heard))) == {"n", "ok"}


def test_an_answer_ends_where_its_grammar_allows_nothing_more(engine: Any, compiler: Any, tokenizer: Any) -> None:
    heard = ask(
        engine, tokenizer("A")["input_ids"], 80, 0, grammar=compiler.compile(Grammar.choice(["yes", "no"]))
    ).wait()
    assert text_of(heard) in ("yes", "no")
    assert heard.end.reason == "stop"
    # Without one more step for the end token.
    assert heard.tokens[-1] not in (0, 4)


def test_a_masked_answer_is_cut_off_at_its_limit(engine: Any, compiler: Any, tokenizer: Any) -> None:
    heard = ask(engine, tokenizer("A")["input_ids"], 5, 0, grammar=compiler.compile(Grammar.regex("[ab]{50}"))).wait()
    assert heard.end.reason == "length"
    assert set(text_of(heard)) <= {"a", "b"}


def test_min_tokens_does_not_open_the_grammar(engine: Any, compiler: Any, tokenizer: Any) -> None:
    heard = Heard()
    sampling = Sampling(temperature=1.0, seed=0, min_tokens=9, top_k=3, min_p=0.2, repetition_penalty=1.3)
    grammar = compiler.compile(Grammar.regex("[ab]{1,3}"))
    engine.submit(Request(tokenizer("A")["input_ids"], 40, sampling, grammar=grammar), heard)
    assert 1 <= len(text_of(heard.wait())) <= 3
    assert heard.end.reason == "stop"


def test_the_engine_draws_what_generate_draws(tiny: Any, engine: Any, compiler: Any, tokenizer: Any) -> None:
    ids = tokenizer("4735 + 281")["input_ids"]
    grammar = compiler.compile(Grammar.json_schema(SCHEMA))
    heard = ask(engine, ids, 80, 0, temperature=0.0, grammar=grammar).wait()
    report = generate(
        tiny,
        tokenizer,
        torch.tensor([ids]),
        max_new_tokens=80,
        logits_processor=LogitsProcessorList([grammar.processor()]),
    )
    assert report.loop == "lean"
    # The engine ends with the grammar, generate() with the end token that comes after it.
    assert list(report.token_ids[:-1]) == heard.tokens
    assert report.token_ids[-1] in (0, 4)
    json.loads(report.text)


def test_a_grammar_that_grows_too_large_is_refused_and_others_go_on(
    engine: Any, compiler: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bad:
        def is_error(self) -> bool:
            return True

        def deep_copy(self) -> "Bad":
            return self

        def compute_bitmask(self) -> bytes:
            return bytes(512)

    grammar = compiler.compile(Grammar.regex("[xyz]+"))
    ids = tokenizer("A")["input_ids"]
    beside = ask(engine, ids, 20, 0)
    monkeypatch.setattr(type(grammar), "start", lambda self: GrammarMask(Bad(), 4096, {0, 4}))
    heard = ask(engine, ids, 20, 0, grammar=grammar).wait()
    assert (heard.end.reason, heard.end.is_refusal) == ("error", True)
    assert "Make it simpler" in (heard.end.error or "")
    assert beside.wait().end.reason in ("stop", "length")
