"""What each policy promises, on the engine itself: exact is exact, nothing waits that must not, no expert starves."""

import random
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from foreroute.engine.interfaces import StepInfo
from foreroute.errors import PolicyError
from foreroute.evals.fetched_only import fetched_only
from foreroute.model.caches import cache_argument, cache_of
from foreroute.policy import Policy
from foreroute.transfer.load import Load
from tests.policies.conftest import FAMILIES
from tests.support.runs import ONE_PROMPT, Output, assert_same_bits, generate, make_batch

LONG = make_batch(14, seed=9)


def same_bits(ours: Output, theirs: Output) -> bool:
    return len(ours.logits) == len(theirs.logits) and all(
        torch.equal(left, right) for left, right in zip(ours.logits, theirs.logits, strict=True)
    )


@pytest.fixture
def load_fitted(load: Any, checkpoints: Any, sidecars: Any) -> Any:
    def loading(family: str, memory: str = "25%", **options: Any) -> Any:
        return load(checkpoints.get(family), memory, predictor=str(sidecars(family)), **options)

    return loading


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_exact_after_an_approximate_policy(self, family, load_fitted, references, checkpoints):
        model = load_fitted(family, policy="speculative", deterministic=True)
        exact = references.output(checkpoints.get(family), ONE_PROMPT)
        approximate = generate(model)
        assert model.foreroute.stats().decode.substituted > 0
        assert not same_bits(approximate, exact), "substitutes changed nothing: the test shows nothing"
        for policy in ("exact", "tolerance:0"):
            before = model.foreroute.stats().decode.substituted
            model.foreroute.set_policy(policy)
            assert_same_bits(generate(model), exact)
            assert model.foreroute.stats().decode.substituted == before

    def test_tolerance_of_all_is_speculative(self, family, load_fitted):
        outputs = []
        for policy in ("tolerance:1", "speculative"):
            model = load_fitted(family, policy=policy, deterministic=True)
            outputs.append(generate(model))
            assert model.foreroute.stats().decode.substituted > 0
        assert_same_bits(*outputs)

    def test_it_waits_in_layer_0_alone(self, family, load_fitted, monkeypatch):
        model = load_fitted(family, policy="speculative", deterministic=True)
        transfer, demanded = model.foreroute.engine.pool.transfer, list[int]()
        generate(model, new_tokens=1)
        inner = transfer.demand
        monkeypatch.setattr(transfer, "demand", lambda key, slot: (demanded.append(key), inner(key, slot)))
        promote = transfer.promote
        monkeypatch.setattr(transfer, "promote", lambda key: (demanded.append(key), promote(key)))
        cache = cache_of(model(ONE_PROMPT.ids, use_cache=True))
        demanded.clear()
        for token in range(20, 40):
            model(torch.tensor([[token]]), **cache_argument(cache), use_cache=True)
        assert demanded, "layer 0 never waited: the test shows nothing"
        assert {model.foreroute.table.keys.expert_id(key).layer for key in demanded} == {0}
        decode = model.foreroute.stats().decode
        assert 0 < decode.stalled_layers <= decode.layers // len(model.foreroute.layers)

    @pytest.mark.parametrize("policy", ["speculative", "tolerance:0.4", "paper"])
    def test_two_runs_by_logical_time_are_equal(self, family, policy, load_fitted, monkeypatch):
        """However long each read takes."""
        read, runs = Load.read, []
        for seed in (0, 1):
            delays = random.Random(seed)

            def slow(self: Load, key: int, slot: int, delays: random.Random = delays) -> None:
                time.sleep(delays.random() * 0.002)
                read(self, key, slot)

            monkeypatch.setattr(Load, "read", slow)
            model = load_fitted(family, policy=policy, deterministic=True)
            output = generate(model, LONG)
            stats = model.foreroute.stats().as_dict()
            for phase in ("prefill", "decode"):
                stats[phase].pop("stall_s")
            # The last prefetches may still be in flight.
            stats.pop("read_s")
            stats.pop("read_bytes")
            runs.append((output, stats))
        assert_same_bits(runs[0][0], runs[1][0])
        assert runs[0][1] == runs[1][1]
        assert runs[0][1]["evictions"] > 0

    @pytest.mark.parametrize("policy", ["exact", "speculative", "tolerance:0.3", "paper"])
    def test_without_a_cache_it_is_what_the_evaluation_says(self, family, policy, load_fitted, fitted):
        """Token by token on the engine, and all at once on tensors."""
        ids = torch.randint(5, 240, (1, 24), generator=torch.Generator().manual_seed(7))
        given, asked = 6, Policy.parse(policy)
        whole = load_fitted(family, "100%", dtype="float32")
        with fetched_only(whole, fitted(family), asked, in_prompts=False) as tally:
            expected = decoded(whole, ids, given)
        model = load_fitted(
            family, "50%", dtype="float32", cache=False, deterministic=True, prefetch_width=whole_k(whole)
        )
        model.foreroute.set_policy(asked)
        model.foreroute.engine.prefetcher.predictor.without_waiting = False  # widths and weights as there
        found = decoded(model, ids, given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        decode = model.foreroute.stats().decode
        if asked.substitutes:
            assert decode.substituted == tally.missed - tally.waited > 0
        if not asked.replaces_route:
            assert decode.misses + decode.late_hits == tally.waited + tally.first_waited > 0

    def test_substituted_experts_are_loaded_in_the_end(self, family, load_fitted):
        """Without prefetch, only deferred loads bring experts of later layers."""
        model = load_fitted(family, "50%", policy="speculative", prefetch="none", deterministic=True)
        generate(model, new_tokens=40)
        first = model.foreroute.stats()
        assert first.decode.deferred_loads > 0
        generate(model, new_tokens=40)
        second = model.foreroute.stats().minus(first).decode
        assert second.substituted < first.decode.substituted
        per_layer = model.foreroute.engine.pool.residency.resident_per_layer
        assert all(per_layer), f"a layer was starved: {per_layer}"

    def test_with_all_experts_there_every_policy_but_paper_is_exact(self, family, load_fitted, references, checkpoints):
        model = load_fitted(family, "100%")
        exact = references.output(checkpoints.get(family), ONE_PROMPT)
        assert_same_bits(generate(model), exact)
        for policy in ("speculative", "tolerance:0.2"):
            model.foreroute.set_policy(policy)
            assert_same_bits(generate(model), exact)
            assert model.foreroute.stats().decode.substituted == 0


def decoded(model: Any, ids: torch.Tensor, given: int) -> torch.Tensor:
    """Logits [tokens, vocabulary] of the tokens behind the first `given`, decoded one by one."""
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids[:, :given], use_cache=True))
        said = [
            model(input_ids=ids[:, at : at + 1], **cache_argument(cache), use_cache=True).logits[0, -1]
            for at in range(given, ids.shape[1])
        ]
    return torch.stack(said)


def whole_k(model: Any) -> int:
    return int(model.foreroute.layers[0].top_k)


def test_each_row_has_its_policy(load_fitted):
    """Rows wait for themselves; what one of them waits for, the others have too."""
    two = make_batch(9, 9, seed=3)
    alone = load_fitted("qwen3_moe", deterministic=True)
    exact = generate(alone, two)
    model = load_fitted("qwen3_moe", deterministic=True)
    model.foreroute.set_policy("exact", "speculative")
    mixed = generate(model, two)
    assert model.foreroute.stats().decode.substituted > 0
    assert mixed.tokens[0].tolist() == exact.tokens[0].tolist()
    for ours, theirs in zip(mixed.logits, exact.logits, strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(PolicyError, match="2 policies were set, and the batch has 1 rows"):
        generate(model)
    model.foreroute.set_policy("exact")
    assert_same_bits(generate(model, two), exact)


def test_batches_find_slots_while_prefetches_and_deferred_loads_are_in_flight(load_fitted, monkeypatch):
    """Reads that take their time, two readers, rows that want much: a demand has room all the same."""
    read, delays = Load.read, random.Random(0)

    def slow(self: Load, key: int, slot: int) -> None:
        time.sleep(delays.random() * 0.003)
        read(self, key, slot)

    monkeypatch.setattr(Load, "read", slow)
    model = load_fitted("qwen3_moe", "40%", policy="speculative", reader_threads=2)
    for rows in (2, 3, 5):
        generate(model, make_batch(*[9] * rows, seed=rows), new_tokens=12)
    decode = model.foreroute.stats().decode
    assert decode.deferred_loads > 0
    assert decode.prefetch_loads > 0


def test_a_wrong_number_of_rows_is_said_before_the_step(load_fitted):
    model = load_fitted("qwen3_moe", "50%")
    generate(model)
    resident = list(model.foreroute.engine.pool.residency.resident_per_layer)
    model.foreroute.set_policy("exact", "speculative")
    with pytest.raises(PolicyError, match="the batch has 1 rows"):
        generate(model)
    model.foreroute.set_policy("exact")
    assert model.foreroute.engine.pool.residency.resident_per_layer == resident


def test_a_prompt_of_one_token_is_a_prompt(load_fitted):
    model = load_fitted("qwen3_moe", policy="speculative")
    model(torch.tensor([[9]]), use_cache=False)
    stats = model.foreroute.stats()
    assert (stats.prefill.tokens, stats.decode.tokens, stats.decode.substituted) == (1, 0, 0)


def test_a_last_token_that_is_said_to_be_a_prompts_is_exact(load_fitted):
    """A chunk of one token under a policy that waits for nothing; undeclared, it is a decoded one."""
    model, ids = load_fitted("qwen3_moe", policy="speculative", deterministic=True), ONE_PROMPT.ids
    last, handle, logits = ids[:, -1:], model.foreroute, {}
    for policy, phase in (("exact", "decode"), ("speculative", "prefill"), ("speculative", None)):
        handle.set_policy("exact")
        cache = cache_of(model(ids[:, :-1], use_cache=True))
        handle.set_policy(policy)
        before = handle.stats()
        with handle.step(StepInfo.of(phase, last)) if phase else nullcontext():
            logits[policy, phase] = model(last, **cache_argument(cache)).logits
        now = handle.stats().minus(before)
        tokens = (now.prefill.tokens, now.decode.tokens)
        assert tokens == ((1, 0) if phase == "prefill" else (0, 1))
    assert torch.equal(logits["exact", "decode"], logits["speculative", "prefill"])


def test_a_step_is_announced_for_one_call(load_fitted):
    model, token = load_fitted("qwen3_moe"), torch.tensor([[9]])
    handle, info = model.foreroute, StepInfo.of("decode", token, is_start=True)
    with handle.step(info):
        model(token, use_cache=False)
        model(token, use_cache=False)
    with pytest.raises(ValueError, match="planted"), handle.step(info):
        raise ValueError("planted")
    model(token, use_cache=False)
    stats = handle.stats()
    assert (stats.decode.steps, stats.prefill.steps) == (1, 2)


def test_paper_holds_where_a_layer_is_streamed(load_fitted, monkeypatch):
    """Rows that want more than the pool holds."""
    model = load_fitted("qwen3_moe", "25%", policy="paper", prefetch="none")
    engine = model.foreroute.engine
    monkeypatch.setattr(engine, "_most_pinned", [0] * len(model.foreroute.layers))
    streamed, made = [], []
    see, inner = engine.policies.see, engine._compute_streamed

    def seeing(*seen):
        made.append(see(*seen))
        return made[-1]

    def streaming(layer, keys, hidden, ids, weights):
        streamed.append(None if engine.is_prefill else ids.tolist())
        return inner(layer, keys, hidden, ids, weights)

    monkeypatch.setattr(engine.policies, "see", seeing)
    monkeypatch.setattr(engine, "_compute_streamed", streaming)
    cache = cache_of(model(ONE_PROMPT.ids, use_cache=True))
    streamed.clear()
    model(torch.tensor([[20]]), **cache_argument(cache), use_cache=True)
    assert len(made) == len(streamed) == len(model.foreroute.layers)
    assert streamed[1:] == [guess.ids.tolist() for guess in made[:-1]]
    decode = model.foreroute.stats().decode
    assert decode.layers == len(streamed)


def test_prompts_are_exact(load_fitted, references, checkpoints):
    model = load_fitted("qwen3_moe", policy="speculative")
    first = generate(model, new_tokens=1)
    theirs = references.output(checkpoints.get("qwen3_moe"), ONE_PROMPT)
    assert torch.equal(first.logits[0], theirs.logits[0])
    assert model.foreroute.stats().prefill.substituted == 0


def test_paper_executes_the_guess(load_fitted):
    """Its keys past layer 0 are what the default vectors guessed, whatever the router says."""
    model = load_fitted("qwen3_moe", "100%", policy="paper")
    engine = model.foreroute.engine
    approximation, routed, executed, guessed = engine.policies, [], [], []
    engine.routing_listener = lambda layer, hidden, ids, weights: routed.append((layer, ids.tolist()))
    see = approximation.see

    def seeing(layer: int, hidden: Any, ids: Any, weights: Any) -> Any:
        executed.append((layer, ids.tolist()))
        guess = see(layer, hidden, ids, weights)
        guessed.append(None if guess is None else guess.ids.tolist())
        return guess

    approximation.see = seeing
    cache = cache_of(model(ONE_PROMPT.ids, use_cache=True))
    routed.clear()
    assert not executed, "a prompt is exact"
    for token in range(20, 30):
        model(torch.tensor([[token]]), **cache_argument(cache), use_cache=True)
    assert [layer for layer, _ in executed] == [layer for layer, _ in routed]
    # And it is the guess that was made one layer before.
    assert all(ids == guessed[at - 1] for at, (layer, ids) in enumerate(executed) if layer > 0)
    differs = [
        sorted(ours[1][0]) != sorted(theirs[1][0]) for ours, theirs in zip(executed, routed, strict=True) if ours[0] > 0
    ]
    assert any(differs)
    assert all(ours == theirs for ours, theirs in zip(executed, routed, strict=True) if ours[0] == 0)


@pytest.mark.parametrize("policy", ["tolerance:0.1", "speculative", "paper"])
def test_a_policy_without_default_vectors_is_refused(policy, load, checkpoints):
    with pytest.raises(PolicyError, match=r"default vectors.*foreroute fit"):
        load(checkpoints.get("qwen3_moe"), policy=policy)
    model = load(checkpoints.get("qwen3_moe"))
    with pytest.raises(PolicyError, match="foreroute fit"):
        model.foreroute.set_policy(policy)
    assert model.foreroute.policies == (Policy(),)


def test_a_policy_that_can_show_nothing_is_refused(load_fitted):
    with pytest.raises(PolicyError, match="no expert would ever be resident"):
        load_fitted("qwen3_moe", policy="speculative", cache=False, prefetch="none")


def test_a_wrong_policy_is_named_before_anything_is_loaded(load, tmp_path):
    with pytest.raises(PolicyError, match="from 0 to 1"):
        load(tmp_path / "no model here", policy="tolerance:2")


def test_paper_needs_the_residual_stream(load_fitted, monkeypatch):
    from foreroute.loading import engines as predictors

    monkeypatch.setattr(predictors, "_has_paper_guess", lambda layers, layer, sidecar: layer != 1)
    with pytest.raises(PolicyError, match="after MoE layer 1 of this model"):
        load_fitted("qwen3_moe", policy="paper")
    load_fitted("qwen3_moe", policy="speculative")
