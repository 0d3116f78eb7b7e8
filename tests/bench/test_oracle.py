"""The oracle says what was routed, of the right pass and layer, and the engine's guesses are then never wrong."""

import pytest
import torch

import foreroute
from foreroute.bench.oracle import Oracle, RouteRecorder
from foreroute.bench.run import Case, fill_pool, run_once
from foreroute.bench.rungs import ORACLE, config_of, rungs_named
from foreroute.config import EngineConfig
from tests.cli.harness import NUM_EXPERTS, NUM_LAYERS, TOP_K

CASE = Case(2, 8, 12)
NOTHING = torch.empty(0)


def test_routes_are_kept_by_pass_and_layer_the_most_wanted_first():
    recorder = RouteRecorder([4, 4])
    prompt = torch.tensor([[3, 1], [3, 2], [1, 3]])
    recorder(0, NOTHING, prompt, NOTHING)
    recorder(1, NOTHING, torch.tensor([[2, 0], [2, 0], [0, 2]]), NOTHING)
    recorder(0, NOTHING, torch.tensor([[2, 0]]), NOTHING)
    recorder(1, NOTHING, torch.tensor([[0, 4]]), NOTHING)  # 4 is no expert
    assert recorder.routes == [[[3, 1, 2], [2, 0]], [[2, 0], [0]]]


def test_the_oracle_tells_the_next_layer_and_the_first_one_of_the_pass_that_begins():
    oracle = Oracle()
    oracle.follow([[[1], [2], [3]], [[4], [5], [6]]])
    assert oracle.guess_first(NOTHING) == [1]
    oracle.see_first(NOTHING, 1)
    assert oracle.guess(0, NOTHING, NOTHING, NOTHING) == [2]
    assert oracle.guess(1, NOTHING, NOTHING, NOTHING) == [3]
    assert oracle.guess_first(NOTHING) == [4]
    oracle.see_first(NOTHING, 1)
    assert oracle.guess(1, NOTHING, NOTHING, NOTHING) == [6]
    assert oracle.guess_first(NOTHING) == ()
    oracle.follow([[[7], [8], [9]]])
    assert oracle.guess_first(NOTHING) == [7]


@pytest.mark.parametrize(("rows", "memory"), [(1, "25%"), (2, "50%")])
def test_no_guess_of_the_oracle_is_wrong(tiny, random_rows, rows, memory):
    (rung,) = rungs_named([ORACLE])
    model = foreroute.load(tiny, memory, config=config_of(rung, EngineConfig()))
    recorder = RouteRecorder([NUM_EXPERTS] * NUM_LAYERS)
    model.foreroute.engine.routing_listener = recorder
    case = Case(rows, CASE.prompt_tokens, CASE.new_tokens)
    first = run_once(model, random_rows[:rows], case)
    model.foreroute.engine.routing_listener = None
    # The lookahead of random weights is wrong now and then.
    assert first.decode.prefetch_wasted + first.decode.prefetch_cancelled > 0
    assert [len(layers) for layers in recorder.routes] == [NUM_LAYERS] * case.new_tokens
    assert {len(experts) for experts in recorder.routes[-1]} <= set(range(1, rows * TOP_K + 1))

    oracle = Oracle()
    model.foreroute.engine.prefetcher.predictor = oracle
    oracle.follow(recorder.routes)
    told = run_once(model, random_rows[:rows], case)
    assert told.choices == first.choices
    assert told.decode.prefetch_used > 0
    # One guess of layer 0 after another would be wrong if passes were miscounted.
    assert told.decode.prefetch_wasted == told.decode.prefetch_cancelled == 0
    assert told.decode.misses == 0
    model.foreroute.close()


def test_a_filled_pool_holds_every_expert(tiny, random_rows):
    model = foreroute.load(tiny, "100%", config=EngineConfig(prefetch="none"))
    fill_pool(model, random_rows[:1, :4])
    assert model.foreroute.engine.pool.residency.resident_per_layer == [NUM_EXPERTS] * NUM_LAYERS
    before = model.foreroute.stats()
    timed = run_once(model, random_rows, CASE)
    assert timed.decode.misses == timed.prefill.misses == 0
    assert model.foreroute.stats().minus(before).read_bytes == 0
    assert model.foreroute.engine.routing_listener is None
    model.foreroute.close()


def test_a_run_is_fed_the_text_and_timed_by_the_clock(tiny, random_rows):
    model = foreroute.load(tiny, "50%")
    seconds = iter([10.0, 12.0, *(12.0 + 0.5 * step for step in range(1, CASE.new_tokens))])
    timed = run_once(model, random_rows, CASE, lambda: next(seconds))
    assert timed.ttft_s == 2.0
    assert timed.tpot_s == pytest.approx(0.5)
    assert next(seconds, None) is None
    assert timed.decode.tokens == 2 * (CASE.new_tokens - 1)
    # What a single pass over the text would choose at the same places.
    whole = model(input_ids=random_rows[:, : CASE.prompt_tokens + CASE.new_tokens - 1]).logits.argmax(-1)
    assert torch.tensor(timed.choices).T.tolist() == whole[:, CASE.prompt_tokens - 1 :].tolist()
    alone = run_once(model, random_rows, Case(2, 20, 0))
    assert (alone.tpot_s, len(alone.choices), alone.prefill.steps) == (None, 1, 1)
    model.foreroute.close()


def test_a_prompt_goes_in_the_chunks_of_the_engine(tiny, random_rows):
    model = foreroute.load(tiny, "50%", config=EngineConfig(prefill_chunk=8))
    timed = run_once(model, random_rows, Case(2, 18, 2))
    assert (timed.prefill.steps, timed.decode.steps) == (3, 1)
    model.foreroute.close()
