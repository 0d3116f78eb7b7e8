"""Room in the KV cache: what an answer may have in all is no demand; where room is short, answers wait for others."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import foreroute
from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import NewToken, PromptProgress, PromptScored, Request, Sampling
from foreroute.batching.steps import RowSteps
from foreroute.config import EngineConfig
from foreroute.model.text import load_tokenizer
from tests.batching.test_engine import GREEDY, TINY, Heard, assert_same_answers, prompts_of

CONTEXT = 64
AGENTS = 32_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Any]:
    model = foreroute.load(TINY, "50%", dtype="float32", config=EngineConfig(packed="no", prefix_cache="16MiB"))
    yield model
    model.foreroute.close()


@pytest.fixture
def engine_of(tiny: Any, tokenizer: Any) -> Iterator[Callable[..., BatchEngine]]:
    engines: list[BatchEngine] = []

    def make(model: Any = tiny, **kwargs: Any) -> BatchEngine:
        engines.append(BatchEngine(model, tokenizer, kwargs.pop("context", CONTEXT), **kwargs))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def aside(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each answer had that was set aside, in order."""
    lengths: list[int] = []
    own = RowSteps.set_aside

    def noted(self: RowSteps, answer: Any, waiting: Any) -> None:
        lengths.append(len(answer.ids))
        own(self, answer, waiting)

    monkeypatch.setattr(RowSteps, "set_aside", noted)
    return lengths


def ask(
    engine: BatchEngine, ids: list[int], new: int | None = AGENTS, sampling: Sampling = GREEDY, **more: Any
) -> Heard:
    heard = Heard()
    engine.submit(Request(ids, new, sampling, num_top_logprobs=2, ignore_eos=True, **more), heard)
    return heard


def at_once(engine: BatchEngine, prompts: list[list[int]], *args: Any, **more: Any) -> list[Heard]:
    """None is begun before the last has come."""
    with engine._changed:
        heard = [ask(engine, ids, *args, **more) for ids in prompts]
    return [one.wait() for one in heard]


def test_more_than_the_context_has_left_is_what_it_has_left(engine_of: Any, tokenizer: Any) -> None:
    engine, ids = engine_of(max_num_seqs=4), tokenizer("def read_lines(path):")["input_ids"]
    capped, is_open = ask(engine, ids).wait(), ask(engine, ids, None).wait()
    assert (capped.end.reason, len(ids) + len(capped.tokens)) == ("length", CONTEXT)
    assert capped.tokens == is_open.tokens
    assert len(ask(engine, [5] * (CONTEXT - 1)).wait().tokens) == 1, "one token fits behind this prompt"


def test_many_that_may_have_all_end_as_they_do_alone(engine_of: Any, tokenizer: Any, aside: list[int]) -> None:
    """Five that grow to half of the cache each: most of them have to wait, some with half an answer."""
    engine = engine_of(max_num_seqs=4, kv_tokens=2 * CONTEXT)
    prompts = prompts_of(tokenizer, 5)
    alone = [ask(engine_of(max_num_seqs=1), ids).wait() for ids in prompts]
    most: list[int] = []

    class Watching(Heard):
        def __call__(self, event: Any) -> None:
            most.append(engine.state().kv_blocks_used)
            super().__call__(event)

    heard = [Watching() for _ in prompts]
    with engine._changed:
        for ids, one in zip(prompts, heard, strict=True):
            engine.submit(Request(ids, AGENTS, GREEDY, num_top_logprobs=2, ignore_eos=True), one)
    for ids, one, other in zip(prompts, alone, [one.wait() for one in heard], strict=True):
        assert (other.end.reason, len(ids) + len(other.tokens)) == ("length", CONTEXT)
        assert_same_answers(one, other)
    assert aside, "nothing was short"
    assert engine.state().set_aside == len(aside)
    assert max(most) <= 2 * CONTEXT
    assert (engine.state().running, engine.state().waiting, engine.state().kv_blocks_used) == (0, 0, 0)


def test_the_oldest_always_goes_on(engine_of: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gave_way: list[int] = []
    own = RowSteps.set_aside

    def noted(self: RowSteps, answer: Any, waiting: Any) -> None:
        assert answer.turn > min(one.turn for one in self.answers)
        gave_way.append(answer.turn)
        own(self, answer, waiting)

    monkeypatch.setattr(RowSteps, "set_aside", noted)
    engine = engine_of(max_num_seqs=3, kv_tokens=CONTEXT)
    heard = at_once(engine, [[5 + at] * 8 for at in range(3)])
    assert [one.end.reason for one in heard] == ["length"] * 3
    assert set(gave_way) == {1, 2}


def test_beyond_its_share_an_answer_lets_others_begin(engine_of: Any, tokenizer: Any, aside: list[int]) -> None:
    """And goes on where it was when they have ended."""
    engine = engine_of(max_num_seqs=4, context=192, kv_tokens=192)
    ids, short = prompts_of(tokenizer, 2)
    expected = ask(engine, ids).wait()
    others: list[Heard] = []
    order: list[str] = []

    class Other(Heard):
        def __call__(self, event: Any) -> None:
            order.append("short") if isinstance(event, NewToken) else None
            super().__call__(event)

    class Long(Heard):
        def __call__(self, event: Any) -> None:
            order.append("long") if isinstance(event, NewToken) else None
            super().__call__(event)
            # It holds more than half of the cache by now.
            if len(self.tokens) == 90 and not others:
                others.append(Other())
                engine.submit(Request(short[:9], 6, GREEDY, ignore_eos=True), others[0])

    heard = Long()
    engine.submit(Request(ids, AGENTS, GREEDY, num_top_logprobs=2, ignore_eos=True), heard)
    assert len(others[0].wait().tokens if heard.wait() else []) == 6
    assert aside
    assert order.index("short") < len(order) - 1 - order[::-1].index("long"), "it waited for the end of the other"
    assert_same_answers(expected, heard)
    assert heard.end.completion_tokens == len(heard.tokens) == 192 - len(ids)


def test_what_was_set_aside_draws_on(engine_of: Any, tokenizer: Any, aside: list[int]) -> None:
    """Its seed, its penalties and its text go on; its prompt is told of and scored once."""
    prompts = prompts_of(tokenizer, 3)
    sampling = Sampling(temperature=1.0, seed=7, frequency_penalty=0.4)
    alone = [ask(engine_of(max_num_seqs=1), ids, AGENTS, sampling, wants_prompt_scores=True).wait() for ids in prompts]
    engine = engine_of(max_num_seqs=3, kv_tokens=CONTEXT)
    together = at_once(engine, prompts, AGENTS, sampling, wants_prompt_scores=True)
    assert aside
    for ids, one, other in zip(prompts, alone, together, strict=True):
        assert other.tokens == one.tokens
        assert "".join(step.text for step in other.steps) == "".join(step.text for step in one.steps)
        scored = [event for event in other.events if isinstance(event, PromptScored)]
        assert [len(event.logprobs) for event in scored] == [len(ids)]
        progress = [event.done for event in other.events if isinstance(event, PromptProgress)]
        assert progress == sorted(set(progress))
        assert progress[-1] == len(ids)
        assert other.end.prompt_tokens == len(ids)


def test_one_that_is_set_aside_can_be_cancelled(
    engine_of: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = RowSteps.set_aside

    def and_cancel(self: RowSteps, answer: Any, waiting: Any) -> None:
        own(self, answer, waiting)
        answer.cancel("The client has left.")

    engine = engine_of(max_num_seqs=2, kv_tokens=CONTEXT)
    with monkeypatch.context() as patched:
        patched.setattr(RowSteps, "set_aside", and_cancel)
        heard = at_once(engine, [[5] * 8, [6] * 8])
    assert [one.end.reason for one in heard] == ["length", "cancelled"]
    assert heard[1].end.completion_tokens == len(heard[1].tokens) > 0
    assert engine.state().waiting == 0


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_windows_and_latent_attention_go_on(
    family: str, checkpoints: Any, load: Any, engine_of: Any, aside: Any
) -> None:
    model = load(checkpoints.get(family), "50%")
    prompts = [[(at * 7 + place) % 50 + 3 for place in range(9 + at)] for at in range(2)]
    alone = [ask(engine_of(model, max_num_seqs=1), ids).wait() for ids in prompts]
    together = at_once(engine_of(model, max_num_seqs=2, kv_tokens=CONTEXT), prompts)
    assert aside
    for one, other in zip(alone, together, strict=True):
        assert_same_answers(one, other)


def test_what_was_set_aside_is_kept_meanwhile(engine_of: Any, tokenizer: Any, tiny: Any, aside: list[int]) -> None:
    """So little of it is computed again."""
    engine = engine_of(max_num_seqs=2, kv_tokens=CONTEXT)
    prompts = prompts_of(tokenizer, 2)
    before = tiny.foreroute.stats()
    at_once(engine, prompts)
    computed = tiny.foreroute.stats().minus(before).prefill.tokens
    assert aside
    assert computed <= sum(map(len, prompts)) + len(aside)
