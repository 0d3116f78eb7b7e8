"""Requests that share steps say what they say alone; what ends, is cancelled or fails leaves nothing behind."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import foreroute
from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Finished, NewToken, PromptProgress, Request, Sampling
from foreroute.batching.row_layers import RowLayer
from foreroute.config import EngineConfig
from foreroute.errors import ContextLengthError, PromptError, QueueFullError
from foreroute.model.text import load_tokenizer

TINY = Path(__file__).parents[2] / "models" / "foreroute-tiny"
GREEDY = Sampling(temperature=0.0)
# The largest difference of a logprob, and of the top two where a token may differ.
ATOL, TIE = 1e-4, 1e-3
WAIT_S = 120


class Heard:
    """One request's events, in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.is_over = threading.Event()

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        if isinstance(event, Finished):
            self.is_over.set()

    def wait(self) -> "Heard":
        assert self.is_over.wait(WAIT_S), "the request did not end"
        return self

    @property
    def steps(self) -> list[NewToken]:
        return [event for event in self.events if isinstance(event, NewToken)]

    @property
    def tokens(self) -> list[int]:
        return [step.token_id for step in self.steps]

    @property
    def end(self) -> Finished:
        return self.events[-1]


@pytest.fixture(scope="module")
def tiny():
    model = foreroute.load(TINY, "25%", dtype="float32", config=EngineConfig(packed="no"))
    yield model
    model.foreroute.close()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture
def engine_of(tokenizer):
    engines = []

    def make(model, **kwargs):
        engines.append(BatchEngine(model, tokenizer, kwargs.pop("context", 512), **kwargs))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def prompts_of(tokenizer, num: int) -> list[list[int]]:
    texts = ["4735 + 281", "Sort: 31 12 87 45 60", "def read_lines(path):", "The capital of", "Mon 3 Jul + 6 days",
             "import os\nimport sys\n\n\ndef main() -> None:", "Reverse: stone", "A"]  # fmt: skip
    return [tokenizer(text)["input_ids"] * (1 + at % 3) for at, text in enumerate(texts[:num])]


def ask(engine, ids, new=24, **kwargs) -> Heard:
    heard = Heard()
    engine.submit(Request(ids, new, GREEDY, num_top_logprobs=2, ignore_eos=True, **kwargs), heard)
    return heard


def assert_same_answers(alone: Heard, together: Heard) -> None:
    """Up to a token where the two likeliest are as good as equal."""
    for one, other in zip(alone.steps, together.steps, strict=True):
        if one.token_id != other.token_id:
            assert one.top[0][1] - one.top[1][1] < TIE
            return
        assert one.logprob == pytest.approx(other.logprob, abs=ATOL)


def together_and_alone(engine, prompts, new=24):
    alone = [ask(engine, ids, new).wait() for ids in prompts]
    together = [ask(engine, ids, new) for ids in prompts]
    return alone, [heard.wait() for heard in together]


def test_eight_say_what_each_says_alone(tiny, tokenizer, engine_of):
    before = tiny.foreroute.stats()
    alone, together = together_and_alone(engine_of(tiny, max_num_seqs=8), prompts_of(tokenizer, 8))
    for one, other in zip(alone, together, strict=True):
        assert len(one.tokens) == 24
        assert_same_answers(one, other)
    done = tiny.foreroute.stats().minus(before)
    assert done.decode.tokens > 2 * done.decode.steps * 0.6, "steps were not shared"
    assert done.evictions > 0


def test_a_seed_draws_alone_what_it_draws_among_eight(tiny, tokenizer, engine_of):
    """Each with settings of its own; the draws of one are no business of another."""
    settings: list[dict[str, Any]] = [
        {}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.1}, {"repetition_penalty": 1.3}, {"temperature": 0.6},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5}, {"logit_bias": {9: 2.0}, "min_tokens": 10},
    ]  # fmt: skip
    engine = engine_of(tiny, max_num_seqs=8)

    def asked(at: int, ids: list[int], seed: int) -> Heard:
        heard = Heard()
        engine.submit(Request(ids, 16, Sampling(**{"temperature": 1.0, "seed": seed, **settings[at]})), heard)
        return heard

    prompts = prompts_of(tokenizer, 8)
    alone = [asked(at, ids, 100 + at).wait().tokens for at, ids in enumerate(prompts)]
    together = [asked(at, ids, 100 + at) for at, ids in enumerate(prompts)]
    assert [heard.wait().tokens for heard in together] == alone
    assert len(alone[7]) >= 10
    assert asked(0, prompts[0], 101).wait().tokens != alone[0]


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_windows_and_latent_attention(family, checkpoints, tokenizer, engine_of, load):
    model = load(checkpoints.get(family), "50%")
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, vocabulary, (n,), generator=draw).tolist() for n in (3, 30, 9, 17, 2, 45)]
    engine = engine_of(model, max_num_seqs=6, context=128)
    assert engine.why_one_row == ""
    alone, together = together_and_alone(engine, prompts, new=20)
    for one, other in zip(alone, together, strict=True):
        assert one.end.reason == "length"
        assert_same_answers(one, other)


def test_rows_join_and_leave(tiny, tokenizer, engine_of):
    engine = engine_of(tiny, max_num_seqs=3)
    prompts = prompts_of(tokenizer, 8)
    lengths = [30, 5, 18, 9, 26, 3, 12, 21]
    alone = [ask(engine, ids, new).wait() for ids, new in zip(prompts, lengths, strict=True)]
    together = [ask(engine, ids, new) for ids, new in zip(prompts, lengths, strict=True)]
    for one, other, new in zip(alone, together, lengths, strict=True):
        assert len(other.wait().tokens) == new
        assert_same_answers(one, other)


def test_what_several_rows_want_is_demanded_once(tiny, tokenizer, engine_of):
    """Of 8 tokens x 4 experts a layer many are the same."""
    engine = engine_of(tiny, max_num_seqs=8)
    before = tiny.foreroute.stats()
    for heard in [ask(engine, ids) for ids in prompts_of(tokenizer, 8)]:
        heard.wait()
    decode = tiny.foreroute.stats().minus(before).decode
    demanded = decode.hits + decode.late_hits + decode.misses
    assert 0 < demanded < 0.8 * decode.tokens * tiny.foreroute.plan.top_k[0] * tiny.foreroute.plan.num_layers
    assert decode.misses == decode.demand_loads


def test_a_long_prompt_does_not_starve_the_others(tokenizer, engine_of):
    model = foreroute.load(TINY, "25%", dtype="float32", config=EngineConfig(packed="no", prefill_chunk=16))
    engine, order = engine_of(model, max_num_seqs=4), []
    begun, over = threading.Event(), threading.Event()

    def short(event):
        order.append("short") if isinstance(event, NewToken) else None
        begun.set()
        over.set() if isinstance(event, Finished) else None

    long = Heard()

    def on_long(event):
        order.append("chunk") if isinstance(event, PromptProgress) else None
        long(event)

    engine.submit(Request([5] * 8, 100, GREEDY, ignore_eos=True), short)
    assert begun.wait(WAIT_S)
    engine.submit(Request([7, 9] * 160, 2, GREEDY, ignore_eos=True), on_long)
    long.wait()
    assert over.wait(WAIT_S)
    first, last = order.index("chunk"), len(order) - 1 - order[::-1].index("chunk")
    assert order.count("chunk") == 20
    assert order[first:last].count("short") >= 15
    model.foreroute.close()


def test_a_prompt_is_computed_in_shorter_pieces_while_others_wait(tiny, tokenizer, engine_of, monkeypatch):
    monkeypatch.setattr("foreroute.batching.steps._CHUNK_BESIDE_OTHERS", 16)
    engine, begun = engine_of(tiny, max_num_seqs=2), threading.Event()
    other = Heard()

    def on_event(event):
        other(event)
        begun.set() if isinstance(event, NewToken) else None

    alone = [event.done for event in ask(engine, [9] * 60, 1).wait().events if isinstance(event, PromptProgress)]
    engine.submit(Request([5] * 8, 60, GREEDY, ignore_eos=True), on_event)
    assert begun.wait(WAIT_S)
    beside = [event.done for event in ask(engine, [8] * 60, 1).wait().events if isinstance(event, PromptProgress)]
    assert alone == [60]
    assert beside == [16, 32, 48, 60]
    other.wait()


def test_cancelled_is_gone(tiny, tokenizer, engine_of):
    engine, begun = engine_of(tiny, max_num_seqs=2), threading.Event()
    heard = Heard()

    def on_event(event):
        heard(event)
        begun.set() if isinstance(event, NewToken) else None

    handle = engine.submit(Request([5] * 8, 400, GREEDY, ignore_eos=True), on_event)
    other = ask(engine, [6] * 8, 40)
    assert begun.wait(WAIT_S)
    engine.cancel(handle)
    assert heard.wait().end.reason == "cancelled"
    assert heard.end.error == "The request was cancelled."
    assert other.wait().end.reason == "length"
    assert len(heard.tokens) < 400
    state = engine.state()
    assert (state.running, state.waiting, state.kv_blocks_used) == (0, 0, 0)


def test_who_is_cancelled_by_the_end_of_the_engine_is_told_so(tiny, engine_of):
    engine, begun = engine_of(tiny, max_num_seqs=1), threading.Event()
    running, waiting, gone = Heard(), Heard(), Heard()

    def on_event(event):
        running(event)
        begun.set() if isinstance(event, NewToken) else None

    engine.submit(Request([5] * 8, 400, GREEDY, ignore_eos=True), on_event)
    engine.submit(Request([6] * 8, 4, GREEDY), waiting)
    left = engine.submit(Request([7] * 8, 4, GREEDY), gone)
    assert begun.wait(WAIT_S)
    # Who had left before the engine ended did not end because of it.
    left.cancel("The request was cancelled.")
    engine.close()
    assert [one.wait().end.reason for one in (running, waiting, gone)] == ["cancelled"] * 3
    assert [one.end.error for one in (running, waiting)] == ["The server is shutting down."] * 2
    assert gone.end.error == "The request was cancelled."


@pytest.mark.parametrize(("ignored", "reason", "num_tokens"), [(False, "stop", 1), (True, "length", 5)])
def test_the_models_own_end_may_be_ignored(tiny, tokenizer, engine_of, ignored, reason, num_tokens):
    end = tiny.generation_config.eos_token_id
    ends = [end] if isinstance(end, int) else list(end)
    heard = Heard()
    sampling = Sampling(temperature=0.0, logit_bias=dict.fromkeys(ends, 100.0))
    engine_of(tiny).submit(Request([5] * 8, 5, sampling, ignore_eos=ignored), heard)
    assert heard.wait().end.reason == reason
    assert len(heard.tokens) == num_tokens
    assert set(heard.tokens) <= set(ends)


def test_an_error_ends_the_step_and_not_the_engine(tiny, tokenizer, engine_of, monkeypatch):
    engine = engine_of(tiny, max_num_seqs=4)
    expected = ask(engine, [5] * 8, 8).wait().tokens
    whole = engine._steps._batch.step

    def fails(*args):
        raise RuntimeError("planted")

    monkeypatch.setattr(engine._steps._batch, "step", fails)
    ended = [ask(engine, [5] * 8, 8), ask(engine, [6] * 8, 8)]
    assert ended[0].wait().end.reason == "error"
    assert "planted" not in (ended[0].end.error or "")
    ended[1].wait()
    assert whole is not engine._steps._batch.step
    assert ask(engine, [5] * 8, 8).wait().tokens == expected
    assert engine.state().kv_blocks_used == 0


def test_an_error_between_steps_leaves_no_request_waiting(tiny, tokenizer, engine_of, monkeypatch):
    engine = engine_of(tiny, max_num_seqs=2)
    expected = ask(engine, [5] * 8, 8).wait().tokens

    def fails(*args):
        raise MemoryError("planted")

    with monkeypatch.context() as patched:
        patched.setattr(engine._steps, "_keep", fails)
        assert ask(engine, [9] * 8, 4).wait().end.reason == "error"
    assert ask(engine, [5] * 8, 8).wait().tokens == expected
    assert (engine.state().running, engine.state().kv_blocks_used) == (0, 0)


def test_a_row_that_cannot_join_leaves_the_others_as_they_are(tiny, tokenizer, engine_of, monkeypatch):
    engine, begun = engine_of(tiny, max_num_seqs=2), threading.Event()
    expected, first = ask(engine, [5] * 8, 60).wait().tokens, Heard()
    join = RowLayer.join

    def on_event(event):
        first(event)
        begun.set() if isinstance(event, NewToken) else None

    def fails(layer, new):
        join(layer, new)
        if layer is engine._steps._batch._cache.layers[5] and engine._steps._batch.lengths:
            raise MemoryError("planted")

    monkeypatch.setattr(RowLayer, "join", fails)
    engine.submit(Request([5] * 8, 60, GREEDY, ignore_eos=True), on_event)
    assert begun.wait(WAIT_S)
    assert ask(engine, [6] * 8, 8).wait().end.reason == "error"
    assert first.wait().tokens == expected


def test_who_comes_while_others_are_looked_through_breaks_nothing(tiny, tokenizer, engine_of, monkeypatch):
    """A request may be queued between any two lines of the engine's thread."""
    engine, begun, more = engine_of(tiny, max_num_seqs=1), threading.Event(), []
    first = Heard()

    def on_event(event):
        first(event)
        begun.set() if isinstance(event, NewToken) else None

    class Waiting(type(engine._waiting)):
        def __iter__(self):
            found = super().__iter__()
            for one in found:
                if len(more) < 3 and not engine._changed._is_owned():
                    more.append(ask(engine, [8 + len(more)] * 5, 2))
                yield one

    engine._waiting = Waiting()
    engine.submit(Request([5] * 8, 40, GREEDY, ignore_eos=True), on_event)
    assert begun.wait(WAIT_S)
    second = ask(engine, [6] * 8, 4)
    assert first.wait().end.reason == second.wait().end.reason == "length"
    assert [heard.wait().end.reason for heard in more] == ["length"] * len(more)


def test_an_empty_prompt_is_refused_and_ends_no_other_request(tiny, tokenizer, engine_of):
    engine = engine_of(tiny, max_num_seqs=2)
    other = ask(engine, [5] * 8, 30)
    with pytest.raises(PromptError, match="empty"):
        engine.submit(Request([], 4, GREEDY), Heard())
    assert other.wait().end.reason == "length"


def test_full_and_too_long(tiny, tokenizer, engine_of):
    engine = engine_of(tiny, max_num_seqs=1, max_waiting=1, context=256)
    with pytest.raises(ContextLengthError, match="256 tokens, and the prompt has 256"):
        engine.submit(Request([5] * 256, 200, GREEDY), Heard())
    first, second = ask(engine, [5] * 8, 100), ask(engine, [6] * 8, 4)
    with pytest.raises(QueueFullError):
        ask(engine, [7] * 8)
    assert first.wait().end.reason == second.wait().end.reason == "length"


def test_keys_and_values_stay_within_their_bound(tiny, tokenizer, engine_of):
    engine, most = engine_of(tiny, max_num_seqs=8, kv_tokens=200), []
    heard = [ask(engine, [at + 5] * 20, 40) for at in range(8)]
    while not all(one.is_over.wait(0.005) for one in heard):
        most.append(engine.state())
    assert max(state.kv_blocks_used for state in most) <= 200
    assert max(state.running for state in most) <= 7
    assert [(one.end.reason, len(one.tokens)) for one in heard] == [("length", 40)] * 8


def test_a_beginning_is_not_computed_twice(tiny, tokenizer, engine_of):
    engine = engine_of(tiny, max_num_seqs=4)
    ids = tokenizer("def read_lines(path):\n    with open(path) as file:")["input_ids"]
    first = ask(engine, ids, 8).wait()
    following = [*ids, *first.tokens[:6], 11, 12, 13]
    again = ask(engine, following, 8).wait()
    assert again.end.cached_tokens >= len(ids)
    fresh = ask(engine_of(tiny, max_num_seqs=1), following, 8).wait()
    assert fresh.end.cached_tokens == 0
    assert_same_answers(fresh, again)


def test_of_a_repeated_prompt_the_last_token_is_computed_as_a_prompts(tiny, tokenizer, engine_of):
    engine, ids = engine_of(tiny, max_num_seqs=4), tokenizer("def read_lines(path):")["input_ids"]
    first = ask(engine, ids, 8).wait()
    before = tiny.foreroute.stats()
    again = ask(engine, ids, 8).wait()
    now = tiny.foreroute.stats().minus(before)
    assert again.end.cached_tokens == len(ids) - 1
    assert (now.prefill.tokens, now.decode.tokens) == (1, 7)
    assert_same_answers(first, again)
