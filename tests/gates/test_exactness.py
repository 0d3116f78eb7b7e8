"""Numbered gates: a model with its experts on disk says what transformers' resident one says, bit for bit.

The reference has experts_implementation="eager" and the same threads, cache, attention, batch and prefill chunks. Each
gate also proves that its feature fired: experts were evicted, guesses were used, the packed store was what was read.
"""

import itertools
import os
import time
from pathlib import Path

import pytest
import torch

from tests.support.families import FAMILIES
from tests.support.runs import (
    ONE_PROMPT,
    THREE_PROMPTS,
    assert_same_bits,
    generate,
    make_batch,
    packed_store,
    slots_memory,
    watch_reads,
    watch_ring,
)

# (family, dtype) -> (largest difference of a logit, why it cannot be zero). Greedy tokens are equal even there.
EXCEPTIONS: dict[tuple[str, str], tuple[float, str]] = {}
ATOL_GROUPED_MM = 5e-5


def token_demand(folder: Path) -> int:
    """Slots that one token needs, by the config."""
    config = FAMILIES[folder.name.split("-")[0]]()
    return (config.num_hidden_layers - getattr(config, "first_k_dense_replace", 0)) * config.num_experts_per_tok


def memory_of(folder: Path, budget: str) -> int | str:
    return slots_memory(folder, token_demand(folder)) if budget == "demand" else budget


def assert_same(model, folder, references, batch, family="", dtype=""):
    ours, theirs = generate(model, batch), references.output(folder, batch)
    assert theirs.num_distinct > 6, "the reference repeats itself: such tokens test little"
    if (family, dtype) not in EXCEPTIONS:
        assert_same_bits(ours, theirs)
        return
    atol, _ = EXCEPTIONS[family, dtype]
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=atol)


def check_against_eager(checkpoints, references, load, family, dtype, store, budget, prefetch):
    folder = checkpoints.get(family, dtype)
    packed = str(packed_store(folder)) if store == "packed" else "no"
    model = load(folder, memory_of(folder, budget), prefetch=prefetch, packed=packed)
    with watch_reads() as reads, watch_ring(model) as borrowed:
        for batch in (ONE_PROMPT, THREE_PROMPTS):
            assert_same(model, folder, references, batch, family, dtype)
    assert_fired(model, budget, prefetch, borrowed)
    assert model.foreroute.plan.source == store
    assert reads.names == ({Path(packed).name} if store == "packed" else {"model.safetensors"})


def assert_fired(model, budget, prefetch, borrowed):
    plan, stats = model.foreroute.plan, model.foreroute.stats()
    assert plan.math == "own"
    assert stats.prefill.tokens > stats.prefill.steps == 2
    assert stats.decode.hits > 0
    if budget == "100%":
        assert plan.num_slots == plan.total_slots
        assert not borrowed, "all experts fit, yet prefill took slots away"
        assert stats.evictions == stats.decode.prefetch_loads == 0
        assert stats.prefill.demand_loads + stats.decode.demand_loads <= plan.total_slots
        return
    assert plan.num_slots == plan.token_demand_slots if budget == "demand" else plan.num_slots > plan.token_demand_slots
    assert max(borrowed) > 0, "prefill needed no more slots than there are"
    assert stats.decode.misses > 0
    assert stats.evictions > 0
    if prefetch == "none":
        assert stats.decode.prefetch_loads == 0
    else:
        assert stats.prefetch_used > 0
        assert stats.decode.late_hits + stats.decode.hits > stats.prefetch_used // 2


# With all experts resident there is nothing to guess: prefetch on shows that nothing is, and off would be the same.
@pytest.mark.parametrize(
    ("budget", "prefetch"),
    [*itertools.product(["demand", "25%", "50%"], ["lookahead", "none"]), ("100%", "lookahead")],
)
@pytest.mark.parametrize("store", ["safetensors", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
class TestAgainstEager:
    def test_g01_fp32(self, checkpoints, references, load, family, store, budget, prefetch):
        check_against_eager(checkpoints, references, load, family, "fp32", store, budget, prefetch)

    def test_g02_bf16(self, checkpoints, references, load, family, store, budget, prefetch):
        check_against_eager(checkpoints, references, load, family, "bf16", store, budget, prefetch)


@pytest.mark.parametrize("store", ["safetensors", "packed"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_g03_fp16(checkpoints, references, load, family, store):
    check_against_eager(checkpoints, references, load, family, "fp16", store, "25%", "lookahead")


@pytest.mark.parametrize("family", FAMILIES)
def test_g04_default_implementation(checkpoints, references, load, family):
    """transformers' default groups the experts' products: other bits, the same tokens."""
    folder = checkpoints.get(family)
    model = load(folder, "25%")
    for batch in (ONE_PROMPT, THREE_PROMPTS):
        theirs, ours = references.output(folder, batch, "grouped_mm"), generate(model, batch)
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=ATOL_GROUPED_MM)
    assert model.foreroute.stats().evictions > 0


def test_g04_the_default_differs_from_eager(checkpoints, references):
    """Were the two the same code, the gate above would be the first one again."""
    grouped, eager = (
        [references.output(checkpoints.get(family), THREE_PROMPTS, which) for family in FAMILIES]
        for which in ("grouped_mm", "eager")
    )
    assert any(
        not torch.equal(left, right)
        for one, other in zip(grouped, eager, strict=True)
        for left, right in zip(one.logits, other.logits, strict=True)
    )


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("eviction", ["lru", "lfu"])
def test_g05_eviction(checkpoints, references, load, family, eviction):
    folder = checkpoints.get(family)
    model = load(folder, "25%", eviction=eviction)
    for batch in (ONE_PROMPT, THREE_PROMPTS):
        assert_same(model, folder, references, batch)
    assert model.foreroute.stats().evictions > 0
    assert type(model.foreroute.engine.pool.residency._eviction).__name__.lower() == eviction


def test_g05_the_orders_of_eviction_differ(checkpoints, load):
    misses = []
    for eviction in ("lru", "lfu"):
        model = load(checkpoints.get("qwen3_moe"), "25%", eviction=eviction, prefetch="none")
        generate(model)
        misses.append(model.foreroute.stats().decode.misses)
    assert misses[0] != misses[1]


@pytest.mark.parametrize("hits_first", [True, False])
def test_g06_hits_first(checkpoints, references, load, hits_first, monkeypatch):
    """With it, resident experts are computed while others are still being read."""
    folder = checkpoints.get("qwen3_moe")
    model = load(folder, "50%", hits_first=hits_first, prefetch="none")
    engine, log = model.foreroute.engine, []
    views, pool = engine.kernels[0].views, engine.pool
    operands, wait = views.operands, pool.transfer.wait

    def noting_operands(layer, slot):
        log.append("compute")
        return operands(layer, slot)

    def noting_wait():
        log.append("wait")
        return wait()

    monkeypatch.setattr(views, "operands", noting_operands)
    monkeypatch.setattr(pool.transfer, "wait", noting_wait)
    # One layer with a hit and a miss: in that step either the hit is computed before the wait, or after it.
    steps = []
    compute = engine.compute

    def noting_compute(layer, hidden, ids, weights):
        log.clear()
        phase = pool.stats.decode
        before = (phase.hits, phase.misses)
        out = compute(layer, hidden, ids, weights)
        if len(hidden) == 1 and phase.hits > before[0] and phase.misses > before[1]:
            steps.append(log[0])
        return out

    monkeypatch.setattr(engine, "compute", noting_compute)
    assert_same(model, folder, references, ONE_PROMPT)
    assert_same(model, folder, references, THREE_PROMPTS)
    assert set(steps) == {"compute" if hits_first else "wait"}


@pytest.mark.parametrize("prefetch", ["lookahead", "none"])
def test_g07_no_cache(checkpoints, references, load, prefetch):
    """On-demand loading: an expert is evicted when its layer is done."""
    folder = checkpoints.get("glm4_moe")
    model = load(folder, "50%", cache=False, prefetch=prefetch)
    for batch in (ONE_PROMPT, THREE_PROMPTS):
        assert_same(model, folder, references, batch)
    stats, residency = model.foreroute.stats(), model.foreroute.engine.pool.residency
    assert residency.num_resident == residency.num_prefetched
    if prefetch == "none":
        assert stats.decode.hits == stats.prefill.hits == 0
        assert stats.decode.misses == stats.decode.demand_loads > 0
    else:
        assert stats.prefetch_used > 0


@pytest.mark.parametrize("store", ["safetensors", "packed"])
def test_g08_two_readers(checkpoints, references, load, store):
    folder = checkpoints.get("olmoe")
    packed = str(packed_store(folder)) if store == "packed" else "no"
    model = load(folder, "25%", reader_threads=2, packed=packed)
    with watch_reads() as reads:
        for batch in (ONE_PROMPT, THREE_PROMPTS):
            assert_same(model, folder, references, batch)
    assert len(reads.threads) == 2


@pytest.mark.parametrize("store", ["safetensors", "packed"])
def test_g09_buffered_reads(checkpoints, references, load, store):
    folder = checkpoints.get("mixtral")
    packed = str(packed_store(folder)) if store == "packed" else "no"
    model = load(folder, "25%", direct_io=False, packed=packed)
    for batch in (ONE_PROMPT, THREE_PROMPTS):
        assert_same(model, folder, references, batch)
    expected = packed if store == "packed" else str(folder / "model.safetensors")
    assert model.foreroute.engine.pool.transfer.buffered_paths == [expected]


@pytest.mark.parametrize("hits_first", [True, False])
@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_g10_late_hits(checkpoints, references, load, family, hits_first, monkeypatch):
    """A disk so slow that prefetches are still in flight when they are demanded, and pile up when they are wrong."""
    folder = checkpoints.get(family)
    model = load(folder, "50%", hits_first=hits_first)
    preadv = os.preadv

    def slow(*args):
        time.sleep(0.002)
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", slow)
    for batch in (ONE_PROMPT, THREE_PROMPTS):
        assert_same(model, folder, references, batch)
    decode = model.foreroute.stats().decode
    assert decode.late_hits > 0
    assert decode.prefetch_cancelled > 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("chunk", [None, 16])
def test_g11_long_prompts(checkpoints, references, load, family, chunk):
    """Every expert is needed, a few slots are there, and decoding goes on with what the cache held."""
    folder, batch = checkpoints.get(family), make_batch(100, 61)
    model = load(folder, slots_memory(folder, token_demand(folder)))
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    theirs = generate(references.model(folder), batch, 4, **options)
    with watch_ring(model) as borrowed:
        assert_same_bits(generate(model, batch, 4, **options), theirs)
    plan, stats = model.foreroute.plan, model.foreroute.stats()
    assert max(borrowed) > 0
    assert stats.prefill.steps == (1 if chunk is None else -(-100 // chunk))
    assert stats.prefill.demand_loads > plan.num_slots


@pytest.mark.parametrize(("stored", "dtype"), [("bf16", "float32"), ("fp32", "bfloat16"), ("fp16", "float32")])
def test_g12_another_compute_dtype(checkpoints, references, load, stored, dtype):
    """Experts are kept as stored, and converted when they are computed."""
    folder = checkpoints.get("deepseek_v3", stored)
    model = load(folder, "25%", dtype=dtype)
    theirs = generate(references.model(folder, dtype=getattr(torch, dtype)))
    assert_same_bits(generate(model), theirs)
    assert model.dtype == getattr(torch, dtype)
    plan = model.foreroute.plan
    assert (plan.stored_dtype, plan.compute_dtype) == (
        {"fp32": "F32"}.get(stored, stored.upper().replace("P", "")),
        dtype,
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_g13_shards(checkpoints, references, load, family):
    folder = checkpoints.get(family, sharded=True)
    model = load(folder, "25%")
    with watch_reads() as reads:
        assert_same(model, folder, references, ONE_PROMPT)
    assert len(reads.names) > 2


@pytest.mark.parametrize(("family", "attention"), [("qwen3_moe", "eager"), ("qwen3_moe", "sdpa"), ("gpt_oss", "eager")])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_g14_attention_and_cache(checkpoints, references, load, family, attention, cache):
    folder = checkpoints.get(family)
    model = load(folder, "25%", attn_implementation=attention)
    reference = references.model(folder, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    theirs = generate(reference, THREE_PROMPTS, 12, cache_implementation=cache)
    assert_same_bits(generate(model, THREE_PROMPTS, 12, cache_implementation=cache), theirs)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_g15_the_familys_own_forward(checkpoints, references, load, family, monkeypatch):
    """Where our maths is not the family's, its own forward runs over streamed experts."""
    monkeypatch.setattr("foreroute.loading.expert_math.prove_math", lambda *_: False)
    folder = checkpoints.get(family)
    model = load(folder, "25%")
    with watch_ring(model) as borrowed:
        for batch in (ONE_PROMPT, THREE_PROMPTS):
            assert_same(model, folder, references, batch)
    assert model.foreroute.plan.math == "family"
    assert max(borrowed) > 0


@pytest.mark.parametrize("width", [1, 8])
def test_g16_width_of_guesses(checkpoints, references, load, width, monkeypatch):
    folder = checkpoints.get("qwen3_moe")
    # A prompt's guesses are of as many experts as its tokens want.
    model = load(folder, "50%", prefetch_width=width, prefetch_prefill="off")
    residency, widths = model.foreroute.engine.pool.residency, []
    prefetch = residency.prefetch

    def noting(keys):
        widths.append(len(keys))
        return prefetch(keys)

    monkeypatch.setattr(residency, "prefetch", noting)
    assert_same(model, folder, references, ONE_PROMPT)
    assert set(widths) - {0} == {width}
    assert model.foreroute.stats().prefetch_used > 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("when", ["on", "auto", "off"])
def test_g17_guesses_in_prefill(checkpoints, references, load, family, when):
    folder = checkpoints.get(family)
    model = load(folder, "50%", prefetch_prefill=when)
    for batch in (ONE_PROMPT, THREE_PROMPTS):
        assert_same(model, folder, references, batch)
    prefill = model.foreroute.stats().prefill
    # These prompts are too short for "auto".
    assert (prefill.prefetch_loads > 0) == (when == "on")
    assert (prefill.prefetch_used > 0) == (when == "on")
    # What a guess fetched is a hit when its layer comes.
    assert prefill.hits > 0
    if when == "auto":
        layer = model.foreroute.layers[0]
        enough = 24 * layer.experts.num_offloaded // layer.top_k
        for length, is_long in ((enough - 1, False), (enough, True)):
            before = model.foreroute.stats().prefill.prefetch_loads
            with torch.no_grad():
                model(torch.arange(length)[None] % 200 + 5, use_cache=False)
            assert (model.foreroute.stats().prefill.prefetch_loads > before) == is_long
