"""Drafts beside a grammar, experts that cannot be read, and requests that leave."""

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import foreroute
from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Request, Sampling
from foreroute.batching.rows import RowsCache
from foreroute.config import EngineConfig
from foreroute.model.draft_model import PROMPT_LOOKUP
from foreroute.model.text import load_tokenizer
from tests.batching.test_engine import GREEDY, TINY, Heard, prompts_of
from tests.drafting.conftest import Fixed, Knowing
from tests.support.broken import unreadable

NEW = 40


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Any]:
    config = EngineConfig(packed="no", draft=PROMPT_LOOKUP)
    model = foreroute.load(TINY, "25%", dtype="float32", config=config)
    yield model
    model.foreroute.close()


@pytest.fixture
def engine_of(tiny: Any, tokenizer: Any) -> Iterator[Callable[..., BatchEngine]]:
    """Makes engines that draft nothing, or, with the texts that will be, those with some tokens changed."""
    engines: list[BatchEngine] = []

    def make(texts: list[list[int]] | None = None) -> BatchEngine:
        tiny.foreroute.draft = None if texts is None else PROMPT_LOOKUP
        engine = BatchEngine(tiny, tokenizer, 512, max_num_seqs=4)
        engines.append(engine)
        drafts = engine._drafts
        if texts is None:
            assert drafts is None
            return engine
        assert drafts is not None

        def of(answer: Any, governor: Any, own: Any = drafts._of) -> list[int]:
            if answer.drafter is None:
                answer.drafter = Knowing()
                begins = (text for text in texts if text[: answer.num_prompt] == answer.ids[: answer.num_prompt])
                answer.drafter.text = next(begins, [])
            return own(answer, governor)

        drafts._of = of
        drafts._governors = {rows: Fixed(3, 1, 6) for rows in range(1, 5)}
        return engine

    yield make
    for engine in engines:
        engine.close()


def ask(engine: BatchEngine, prompts: list[list[int]], **more: Any) -> list[Heard]:
    """All at once: none is begun before the last has come."""
    heard = [Heard() for _ in prompts]
    with engine._changed:
        for ids, one in zip(prompts, heard, strict=True):
            engine.submit(Request(ids, NEW, GREEDY, ignore_eos=True, **more), one)
    return heard


def tokens_of(heard: list[Heard]) -> list[list[int]]:
    return [one.wait().tokens for one in heard]


def forget(model: Any, engine: BatchEngine) -> None:
    with model.foreroute.lock:
        engine._kept.clear()
        model.foreroute.engine.pool.reset()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_decides_beside_a_draft(tiny: Any, tokenizer: Any, engine_of: Any, temperature: float) -> None:
    """Where the draft has what the grammar forbids it is not taken; a row without one is none the wiser."""
    pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")
    from foreroute.structured.compiler import GrammarCompiler
    from foreroute.structured.grammar import Grammar

    schema = {
        "type": "object", "additionalProperties": False, "required": ["n", "ok"],
        "properties": {"n": {"type": "integer", "minimum": 10, "maximum": 99}, "ok": {"type": "boolean"}},
    }  # fmt: skip
    grammar = GrammarCompiler.of(tiny, tokenizer).compile(Grammar.json_schema(schema))
    prompts = prompts_of(tokenizer, 3)

    def answers(engine: BatchEngine) -> list[Heard]:
        heard = [Heard() for _ in prompts]
        with engine._changed:
            for at, (ids, one) in enumerate(zip(prompts, heard, strict=True)):
                masked = None if at == 1 else grammar
                sampling = Sampling(temperature=temperature, seed=at)
                engine.submit(Request(ids, 80 if masked else NEW, sampling, grammar=masked), one)
        return [one.wait() for one in heard]

    without = answers(engine_of())
    engine = engine_of([[*ids, *one.tokens] for ids, one in zip(prompts, without, strict=True)])
    drafted = answers(engine)
    state = engine.state()
    assert [one.tokens for one in drafted] == [one.tokens for one in without]
    assert 0 < state.accepted < state.drafted
    for one in (drafted[0], drafted[2]):
        if not temperature:
            # Greedily this model writes blanks for ever, which JSON allows.
            assert one.end.reason in ("stop", "length")
            continue
        assert one.end.reason == "stop"
        assert set(json.loads("".join(step.text for step in one.steps) + one.end.text)) == {"n", "ok"}


def texts_of(prompts: list[list[int]], tokens: list[list[int]]) -> list[list[int]]:
    return [[*ids, *some] for ids, some in zip(prompts, tokens, strict=True)]


def watch_verify_steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Whether a verify step runs, how many tokens they had, and how many had one token more than rows."""
    own, seen = RowsCache.step, {"is_running": 0, "tokens": 0, "drafted": 0}

    def step(self: Any, tokens: Any, phase: Any, **options: Any) -> Any:
        count = sum(map(len, tokens))
        seen["is_running"] = int(phase == "verify")
        seen["tokens"] += count if phase == "verify" else 0
        seen["drafted"] = count - len(tokens)
        return own(self, tokens, phase, **options)

    monkeypatch.setattr(RowsCache, "step", step)
    return seen


def experts_of_tokens(model: Any, engine: BatchEngine, prompts: list[list[int]]) -> list[set[int]]:
    """The experts past the first layer that each one's own tokens want."""
    wanted, width = list[set[int]](), model.foreroute.table.num_experts

    def observe(layer: int, hidden: Any, routed: Any, weights: Any) -> None:
        if layer and not model.foreroute.engine.is_prefill:
            wanted[-1].update(layer * width + expert for expert in routed.flatten().tolist())

    model.foreroute.engine.routing_listener = observe
    for ids in prompts:
        wanted.append(set())
        tokens_of(ask(engine, [ids]))
    model.foreroute.engine.routing_listener = None
    return wanted


def test_an_expert_that_cannot_be_read_ends_the_row_that_wants_it(
    tiny: Any, tokenizer: Any, engine_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In verify steps alone; the others say what they say without drafts, whatever was drafted for them wrongly."""
    prompts, plain = prompts_of(tokenizer, 4), engine_of()
    wanted, without = experts_of_tokens(tiny, plain, prompts), tokens_of(ask(plain, prompts))
    bad = wanted[0] - set().union(*wanted[1:])
    assert bad, "every expert is wanted by several: the test shows nothing"
    engine, seen = engine_of(texts_of(prompts, without)), watch_verify_steps(monkeypatch)
    forget(tiny, engine)
    with unreadable(tiny, lambda key: bool(seen["is_running"]) and key in bad) as failed:
        heard = [one.wait() for one in ask(engine, prompts)]
    assert failed
    assert seen["tokens"]
    assert [one.end.reason for one in heard] == ["error", "length", "length", "length"]
    assert "planted" in str(heard[0].end.error)
    assert heard[0].tokens == without[0][: len(heard[0].tokens)]
    assert len(heard[0].tokens) < NEW
    assert [one.tokens for one in heard[1:]] == without[1:]
    assert engine.state().kv_blocks_used == 0
    assert tokens_of(ask(engine, prompts)) == without


@pytest.mark.parametrize("num_rows", [1, 3])
def test_what_only_a_drafted_token_wants_ends_no_row(
    tiny: Any, tokenizer: Any, engine_of: Any, monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    """Its expert cannot be read: the row goes on with the token that was chosen."""
    prompts = prompts_of(tokenizer, num_rows)
    without = tokens_of(ask(engine_of(), prompts))
    engine, seen = engine_of(texts_of(prompts, without)), watch_verify_steps(monkeypatch)
    forget(tiny, engine)
    with unreadable(tiny, lambda key: bool(seen["is_running"]) and seen["drafted"] > 0) as failed:
        heard = ask(engine, prompts)
        assert tokens_of(heard) == without
    assert failed
    assert seen["tokens"] > 0


def test_an_error_that_passes_ends_no_row_that_is_verified(
    tiny: Any, tokenizer: Any, engine_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are computed one by one then, each with its drafted tokens."""
    prompts = prompts_of(tokenizer, 3)
    without = tokens_of(ask(engine_of(), prompts))
    engine = engine_of(texts_of(prompts, without))
    forget(tiny, engine)
    own, own_apart, is_verifying, apart = RowsCache.step, RowsCache.step_apart, False, list[int]()

    def step(self: Any, tokens: Any, phase: Any, **options: Any) -> Any:
        nonlocal is_verifying
        is_verifying = phase == "verify" and not apart
        return own(self, tokens, phase, **options)

    def step_apart(self: Any, tokens: Any, phase: Any, **options: Any) -> Any:
        nonlocal is_verifying
        is_verifying = False
        apart.append(sum(map(len, tokens)))
        return own_apart(self, tokens, phase, **options)

    monkeypatch.setattr(RowsCache, "step", step)
    monkeypatch.setattr(RowsCache, "step_apart", step_apart)
    with unreadable(tiny, lambda key: is_verifying):
        heard = ask(engine, prompts)
        assert tokens_of(heard) == without
    assert apart
    assert apart[0] > len(prompts), "no drafted token was computed apart"
    assert [one.end.reason for one in heard] == ["length"] * 3


def test_a_request_that_leaves_takes_its_draft_with_it(tiny: Any, tokenizer: Any, engine_of: Any) -> None:
    """Cancelled from another thread, as at Ctrl-C or a lost connection, while drafts are verified."""
    prompts = prompts_of(tokenizer, 3)
    without = tokens_of(ask(engine_of(), prompts))
    engine = engine_of(texts_of(prompts, without))
    leaving, heard = threading.Event(), [Heard() for _ in prompts]
    requests = [Request(ids, NEW, GREEDY, ignore_eos=True) for ids in prompts]

    def leaves(event: Any) -> None:
        heard[1](event)
        if len(heard[1].tokens) == 9 and not leaving.is_set():
            leaving.set()
            handles[1].cancel()

    with engine._changed:
        handles = [engine.submit(request, leaves if at == 1 else heard[at]) for at, request in enumerate(requests)]
    for one in heard:
        one.wait()
    assert heard[1].end.reason == "cancelled"
    assert heard[1].tokens == without[1][: len(heard[1].tokens)]
    assert len(heard[1].tokens) < NEW
    assert [heard[0].tokens, heard[2].tokens] == [without[0], without[2]]
    assert engine.state().kv_blocks_used == 0


def test_an_engine_that_closes_amid_drafts_leaves_the_model_whole(tiny: Any, tokenizer: Any, engine_of: Any) -> None:
    """Ctrl-C of a server: requests end as cancelled, and the model says the same to the next engine."""
    prompts = prompts_of(tokenizer, 3)
    without = tokens_of(ask(engine_of(), prompts))
    texts = texts_of(prompts, without)
    engine, begun = engine_of(texts), threading.Event()
    heard = [Heard() for _ in prompts]

    def first(event: Any) -> None:
        heard[0](event)
        if len(heard[0].tokens) >= 5:
            begun.set()

    with engine._changed:
        for at, ids in enumerate(prompts):
            engine.submit(Request(ids, 200, GREEDY, ignore_eos=True), first if at == 0 else heard[at])
    assert begun.wait(60)
    engine.close()
    for one, tokens in zip(heard, without, strict=True):
        assert one.wait().end.reason != "length"
        count = min(NEW, len(one.tokens))
        assert one.tokens[:count] == tokens[:count]
    assert tokens_of(ask(engine_of(texts), prompts)) == without


def test_a_row_that_gives_way_leaves_its_drafts_cache(tiny: Any, tokenizer: Any, engine_of: Any) -> None:
    prompts = prompts_of(tokenizer, 2)
    without = tokens_of(ask(engine_of(), prompts))
    engine = engine_of(texts_of(prompts, without))
    steps, begun = engine._steps, threading.Event()
    heard = [Heard() for _ in prompts]

    def first(event: Any) -> None:
        heard[0](event)
        if len(heard[0].tokens) == 5 and not begun.is_set():
            begun.set()
            # On the engine's thread, between two tokens of a step: done before the next step.
            gone.append(steps.running[1])

    gone: list[Any] = []
    had: list[Any] = []
    own = steps.compute

    def compute() -> None:
        if gone and not had:
            had.append(gone[0].drafter)
            waiting: list[Any] = []
            steps.set_aside(gone[0], waiting)
            had.append(gone[0].drafter)
            engine._waiting.extend(waiting)
        own()

    steps.compute = compute
    with engine._changed:
        for at, ids in enumerate(prompts):
            engine.submit(Request(ids, NEW, GREEDY, ignore_eos=True), first if at == 0 else heard[at])
    assert tokens_of(heard) == without
    assert isinstance(had[0], Knowing)
    assert had[1] is None
