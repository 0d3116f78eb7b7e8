"""An expert that cannot be read ends the requests that want it, and no other: these say what they say without it."""

import pytest
import torch

import foreroute
from foreroute.batching.engine import BatchEngine
from foreroute.batching.requests import Request
from foreroute.batching.row_layers import RowLayer, RowLengths
from foreroute.batching.rows import RowsCache
from foreroute.config import EngineConfig
from foreroute.model.text import load_tokenizer
from tests.batching.test_engine import GREEDY, TINY, Heard, assert_same_answers, prompts_of
from tests.support.broken import unreadable

NEW = 12


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def tiny():
    model = foreroute.load(TINY, "25%", dtype="float32", config=EngineConfig(packed="no", prefill_chunk=16))
    yield model
    model.foreroute.close()


@pytest.fixture(scope="module")
def windows(checkpoints):
    model = foreroute.load(checkpoints.get("gpt_oss"), "50%", config=EngineConfig(packed="no", prefill_chunk=16))
    yield model
    model.foreroute.close()


@pytest.fixture
def engine_of(tokenizer):
    engines = []

    def make(model):
        engines.append(BatchEngine(model, tokenizer, 160, max_num_seqs=8))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(params=["tiny", "windows"])
def asked(request, tokenizer):
    """A model, and prompts of different lengths, which share steps; each wants experts that others do not."""
    model = request.getfixturevalue(request.param)
    if request.param == "tiny":
        return model, prompts_of(tokenizer, 8)
    draw = torch.Generator().manual_seed(4)
    return model, [torch.randint(3, 250, (n,), generator=draw).tolist() for n in (3, 1, 4, 2)]


def ask(engine, prompts) -> list[Heard]:
    """All at once: none is begun before the last has come."""
    heard = [Heard() for _ in prompts]
    with engine._changed:
        for ids, one in zip(prompts, heard, strict=True):
            engine.submit(Request(ids, NEW, GREEDY, num_top_logprobs=2, ignore_eos=True), one)
    return [one.wait() for one in heard]


def forget(model, engine) -> None:
    """Nothing of the prompts is kept, and no expert is resident; after the step that ended the last request."""
    with model.foreroute.lock:
        engine._kept.clear()
        model.foreroute.engine.pool.reset()


def keys_of(model, engine, ids) -> tuple[Heard, set[int], set[int]]:
    """One request alone: what it says, and the experts that its prompt and that its tokens want."""
    engine_of_model = model.foreroute.engine
    engine._kept.clear()
    wanted: dict[bool, set[int]] = {True: set(), False: set()}

    def observe(layer, hidden, routed, weights):
        base = layer * model.foreroute.table.num_experts
        wanted[engine_of_model.is_prefill].update(base + expert for expert in routed.flatten().tolist())

    engine_of_model.routing_listener = observe
    try:
        (heard,) = ask(engine, [ids])
    finally:
        engine_of_model.routing_listener = None
    return heard, wanted[True], wanted[False]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_who_needs_it_fails_and_the_others_go_on(asked, engine_of, phase):
    model, prompts = asked
    engine = engine_of(model)
    alone = [keys_of(model, engine, ids) for ids in prompts]
    wants = [in_prompt | in_tokens for _, in_prompt, in_tokens in alone]
    in_prompts, in_tokens = (set().union(*(one[at] for one in alone)) for at in (1, 2))
    # One that few want, not of the first layer: what layers before have added has to go again.
    first = set(range(model.foreroute.table.num_experts))
    possible = (in_prompts if phase == "prefill" else in_tokens - in_prompts) - first
    bad = max(possible, key=lambda key: (-sum(key in one for one in wants), key))
    fails = [bad in one for one in wants]
    assert 0 < sum(fails) < len(fails), "all demand it, or none: the test shows nothing"
    forget(model, engine)
    with unreadable(model, lambda key: key == bad) as failed:
        together = ask(engine, prompts)
    assert failed
    for one, (expected, in_prompt, _), is_failing in zip(together, alone, fails, strict=True):
        assert one.end.reason == ("error" if is_failing else "length")
        assert one.end.error is None or "planted" in one.end.error
        if is_failing:
            assert one.tokens == expected.tokens[: len(one.tokens)]
            assert len(one.tokens) < (1 if bad in in_prompt else NEW)
        else:
            assert_same_answers(expected, one)
            assert len(one.tokens) == NEW
    assert engine.state().kv_blocks_used == 0


@pytest.mark.parametrize("every", [3, 11])
def test_a_transient_error_ends_no_request(asked, engine_of, every):
    """Each time that the disk fails it is well again when rows are computed one by one."""
    model, prompts = asked
    engine, reads = engine_of(model), 0
    expected = ask(engine, prompts)
    forget(model, engine)
    apart, step_apart, is_apart, is_failing = [], RowsCache.step_apart, False, False

    def noting(rows, tokens, phase, **options):
        nonlocal is_apart, is_failing
        apart.append(len(tokens))
        is_apart, is_failing = True, False
        try:
            return step_apart(rows, tokens, phase, **options)
        finally:
            is_apart = False

    def fails(key):
        nonlocal reads, is_failing
        reads += 1
        # Until a step fails by it: a guess that cannot be read ends no step.
        is_failing = is_failing or reads % every == 0
        # Not while rows are apart, or where there is one: then nothing is left to try.
        rows = (engine._steps._prompts, engine._steps._batch)
        return is_failing and not is_apart and min(len(one.lengths) != 1 for one in rows)

    with pytest.MonkeyPatch.context() as patch, unreadable(model, fails):
        patch.setattr(RowsCache, "step_apart", noting)
        together = ask(engine, prompts)
    assert apart
    assert max(apart) > 1
    for one, other in zip(expected, together, strict=True):
        assert other.end.reason == "length"
        assert_same_answers(one, other)


def test_one_request_alone_fails_at_once(tiny, tokenizer, engine_of):
    engine = engine_of(tiny)
    (expected,) = ask(engine, prompts_of(tokenizer, 1))
    forget(tiny, engine)
    with unreadable(tiny, lambda key: True) as failed:
        (heard,) = ask(engine, prompts_of(tokenizer, 1))
    assert (heard.end.reason, "planted" in heard.end.error, len(failed) > 0) == ("error", True, True)
    assert ask(engine, prompts_of(tokenizer, 1))[0].tokens == expected.tokens


def test_all_fail_where_nothing_can_be_read(tiny, tokenizer, engine_of):
    engine = engine_of(tiny)
    expected = ask(engine, prompts_of(tokenizer, 4))
    engine._kept.clear()
    forget(tiny, engine)
    with unreadable(tiny, lambda key: True):
        assert [one.end.reason for one in ask(engine, prompts_of(tokenizer, 4))] == ["error"] * 4
    for one, again in zip(expected, ask(engine, prompts_of(tokenizer, 4)), strict=True):
        assert_same_answers(one, again)


@pytest.mark.parametrize("window", [None, 6])
def test_what_a_layer_takes_back_was_never_there(window):
    """Rows of different lengths that get different numbers of tokens, so that some move; in a window and without."""
    draw = torch.Generator().manual_seed(1)
    rows = RowLengths()
    layer, other = RowLayer(rows, window), RowLayer(rows, window)
    rows.set([0, 0, 0])

    def add(*new: int) -> None:
        states = torch.randn(3, 2, max(new), 4, generator=draw)
        rows.begin(new)
        layer.update(states, -states)

    def held() -> list[torch.Tensor]:
        alone = [layer.row(at, like_of(window)) for at in range(3) if rows.had[at]]
        return [states for one in alone for states in (one.keys, one.values)]

    for new in ((3, 1, 5), (1, 1, 1), (4, 2, 1), (1, 1, 1), (70, 3, 9), (1, 1, 1)):
        before, end = held(), layer._end
        add(*new)
        # The other one was not reached by the step.
        other.undo_step()
        layer.undo_step()
        layer.undo_step()
        rows.set(rows.had)
        assert [torch.equal(*pair) for pair in zip(before, held(), strict=True)] == [True] * len(before)
        assert layer.get_seq_length() == max(rows.had)
        assert layer._end >= 0 or end == 0
        add(*new)
        rows.end()
    assert rows.had == [80, 9, 18]


def like_of(window):
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
