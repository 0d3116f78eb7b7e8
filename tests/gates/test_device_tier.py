"""The device control plane, composed as on a GPU: planned, fetched, computed, guessed; prefill through layer buffers.

Operations are the plain references here, and forked work runs as late as it may, so that a missing join shows. Bits are
those of the resident model; the graph itself needs a GPU (tests/gpu).
"""

from dataclasses import replace

import pytest
import torch

from foreroute import EngineConfig
from foreroute.checkpoint.layouts import ExpertLayout, Part
from foreroute.device import paging
from foreroute.device import tier as device_tier
from foreroute.device.overlap import LateBranch
from foreroute.device.slot_math import GatheredSlotMath, KernelSlotMath, form_of
from foreroute.engine.interfaces import StepInfo
from foreroute.errors import DeviceError, PromptError, RefusedError
from foreroute.generation.generate import generate as answer
from foreroute.generation.graph_decoder import GraphDecoder
from foreroute.generation.prefix_cache import PromptCache
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.kernels.triton import expert_form
from foreroute.kernels.triton.expert_form import CLAMPED, SILU
from foreroute.loading.expert_math import describe_math
from foreroute.model.text import load_tokenizer
from foreroute.predict.base import TokenGuess
from tests.support.runs import ONE_PROMPT, THREE_PROMPTS, assert_same_bits, decode_greedily, generate, make_batch


def counts(model) -> dict[str, int]:
    return model.foreroute.engine.state.counts()


@pytest.mark.parametrize("memory", ["25%", "50%", "100%"])
@pytest.mark.parametrize(("family", "dtype"), [("qwen3_moe", "fp32"), ("qwen3_moe", "bf16"), ("gpt_oss", "fp32")])
def test_bits_are_those_of_the_resident_model(checkpoints, references, load, family, dtype, memory):
    folder = checkpoints.get(family, dtype)
    model = load(folder, memory, control="device")
    for batch in (ONE_PROMPT, THREE_PROMPTS):
        assert_same_bits(generate(model, batch), references.output(folder, batch))
    seen, tier = counts(model), model.foreroute.engine
    assert seen["hits"] > 0
    assert seen["misses"] > 0
    assert seen["shortages"] == 0
    assert (seen["prefetch_used"] > 0) == (seen["evictions"] > 0) == (memory != "100%")
    assert (seen["late_hits"] > 0) == (memory != "100%")
    assert tier.buffers.whole_layers > 0
    assert tier.buffers.single_experts > 0
    stats = model.foreroute.stats()
    assert stats.decode.misses == seen["misses"]
    assert stats.prefill.steps == 2


def test_on_demand_without_guesses(checkpoints, references, load):
    folder = checkpoints.get("deepseek_v3")
    model = load(folder, "25%", control="device", prefetch="none")
    assert_same_bits(generate(model), references.output(folder))
    assert counts(model)["prefetched"] == counts(model)["late_hits"] == 0


def test_first_choices_of_all_rows_are_guessed_first(checkpoints, load, monkeypatch):
    model = load(checkpoints.get("qwen3_moe"), "50%", control="device")
    tier, asked = model.foreroute.engine, []
    guesses = torch.tensor([[1, 2, 3], [4, 5, 6]])
    tier._guess = lambda layer, seen, width: TokenGuess(guesses, guesses)

    class Noting:
        def plan_prefetch(self, state, layer, guesses, copies, *, arrived) -> None:
            asked.append((layer, guesses.tolist(), arrived))
            paging.plan_prefetch(state, layer, guesses, copies, arrived=arrived)

        plan, fetch = staticmethod(paging.plan), staticmethod(paging.fetch)

    tier._paging = Noting()
    tier.begin_step(StepInfo("decode", 2, 1))
    tier.compute(0, torch.zeros(2, 64), torch.tensor([[0, 1, 2], [2, 3, 4]]), torch.ones(2, 3))
    assert asked == [(1, [1, 4, 2, 5, 3, 6], True)]


def test_the_join_is_needed(checkpoints, references, load, monkeypatch):
    """Without it, guesses' bytes are not there when they are computed with: the gates above would see it."""
    folder = checkpoints.get("qwen3_moe")
    model = load(folder, "25%", control="device")

    def forget(self) -> None:
        self._work = None

    monkeypatch.setattr(LateBranch, "join", forget)
    assert not torch.equal(generate(model).tokens, references.output(folder).tokens)


def test_more_rows_than_the_pool_serves_go_the_way_of_prefill(checkpoints, references, load):
    folder = checkpoints.get("qwen3_moe")
    model, batch = load(folder, "25%", control="device"), make_batch(*[9] * 5)
    assert model.foreroute.engine.most_rows < 5
    assert_same_bits(generate(model, batch, 6), generate(references.model(folder), batch, 6))
    assert counts(model)["misses"] == 0


def test_a_long_prompt_leaves_the_pool_alone_and_then_seeds_it(checkpoints, references, load):
    folder, batch = checkpoints.get("qwen3_moe"), make_batch(100)
    model = load(folder, "25%", control="device", prefetch="none")
    tier = model.foreroute.engine
    with torch.no_grad():
        model(batch.ids, use_cache=False)
    assert (tier.state.key_of_slot >= 0).sum() == 0
    num_experts = tier.table.num_experts
    uses = tier.buffers.uses[:, :num_experts].flatten().clone()
    tier.seed()
    held = tier.state.key_of_slot[tier.state.key_of_slot >= 0].tolist()
    most = tier.state.num_slots - tier.state.staging_slots
    assert sorted(held) == sorted(uses.sort(descending=True, stable=True).indices[:most].tolist())
    assert sum(counts(model).values()) == 0, "no expert was demanded"
    theirs = generate(references.model(folder), batch, 6, prefill_chunk_size=16)
    assert_same_bits(generate(model, batch, 6, prefill_chunk_size=16), theirs)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_step_of_a_graph_without_the_graph(checkpoints, references, load, family):
    """Fixed cache, positions as tensors, no hook: the tokens of the resident model."""
    folder = checkpoints.get(family)
    model = load(folder, "25%", control="device")
    decoder = GraphDecoder(model, 1, 64)
    expected = references.output(folder).tokens[:, ONE_PROMPT.ids.shape[1] :]
    for _ in range(2):  # the second text finds the cache of the first
        assert decode_greedily(decoder, ONE_PROMPT.ids, expected.shape[1]).tolist() == expected.tolist()
    assert not decoder.is_captured
    assert model.foreroute.stats().decode.steps == 2 * (expected.shape[1] - 1)
    two = decode_greedily(GraphDecoder(model, 2, 40), ONE_PROMPT.ids.expand(2, -1), 8)
    assert two.tolist() == expected[:, :8].expand(2, -1).tolist()


def test_answers_go_through_the_decoder(checkpoints, references, load):
    folder = checkpoints.get("qwen3_moe")
    model = load(folder, "25%", control="device", kv_tokens=32)
    tokenizer = load_tokenizer(folder)
    expected = references.output(folder).tokens[0, ONE_PROMPT.ids.shape[1] :].tolist()
    reuse = PromptCache(2**30)
    for _ in range(2):
        report = answer(model, tokenizer, ONE_PROMPT.ids, max_new_tokens=32, do_sample=False, reuse=reuse)
        assert report.loop == "lean"
        assert report.prompt_tokens_reused == 0
        assert list(report.token_ids) == expected[: len(report.token_ids)]
        assert len(report.token_ids) > 10
    kept = model.foreroute.decoder
    assert kept.max_length == ONE_PROMPT.ids.shape[1] + 32
    short = answer(model, tokenizer, ONE_PROMPT.ids, max_new_tokens=4, do_sample=False, prefill_chunk=8)
    assert list(short.token_ids) == expected[:4]
    assert model.foreroute.decoder is kept, "it is long enough"


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_gathered_experts_say_the_same(checkpoints, references, load, family):
    """The maths that a graph can hold: no slot is read back, and logits differ by rounding alone."""
    folder = checkpoints.get(family)
    model = load(folder, "50%", control="device")
    tier = model.foreroute.engine
    layouts = [layer.layout for layer in tier.table.layers]
    math = [describe_math(layer.experts) for layer in model.foreroute.layers]
    tier._slot_math = GatheredSlotMath(tier._pool, layouts, math, torch.float32)
    for batch in (ONE_PROMPT, THREE_PROMPTS):
        ours, theirs = generate(model, batch), references.output(folder, batch)
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=5e-5)
    assert counts(model)["misses"] > 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_the_kernels_form_of_a_family_is_found_and_gives_its_tokens(checkpoints, references, load, family):
    """By the kernels' reference; the kernels themselves are held to it elsewhere."""
    folder = checkpoints.get(family)
    model = load(folder, "50%", control="device")
    tier, layers = model.foreroute.engine, model.foreroute.layers
    forms = []
    for layer, described in zip(layers, tier.table.layers, strict=True):
        math = describe_math(layer.experts)
        forms.append(form_of(layer.experts, described.layout, math, torch.float32))
        assert form_of(layer.experts, described.layout, math, torch.bfloat16) is None
        wrong = replace(math, gate=lambda inner: inner.chunk(2, -1)[0])
        assert form_of(layer.experts, described.layout, wrong, torch.float32) is None
    is_oss = family == "gpt_oss"
    assert {(form.is_interleaved, form.gate) for form in forms} == {(is_oss, CLAMPED if is_oss else SILU)}
    tier._slot_math = KernelSlotMath(expert_form.experts, tier._pool, forms)
    ours, theirs = generate(model, ONE_PROMPT, 12), references.output(folder)
    assert ours.tokens.tolist() == theirs.tokens[:, : ours.tokens.shape[1]].tolist()
    torch.testing.assert_close(ours.logits, theirs.logits[:12], rtol=0, atol=5e-5)


def test_ids_that_are_no_expert_add_nothing():
    part = Part("up", 0, 64, (4, 4), "F32"), Part("down", 64, 32, (4, 2), "F32")
    pool = torch.full((2, 4096), 255, dtype=torch.uint8)  # not numbers
    math = ExpertMath(lambda inner: inner[:, :2], 0, 1)
    compute = GatheredSlotMath(pool, [ExpertLayout(part)], [math], torch.float32)
    pool[1, :96] = torch.ones(24).view(torch.uint8)
    ids, slots = torch.tensor([[5, 9]]), torch.tensor([[1, -1]], dtype=torch.int32)
    out = compute(0, torch.ones(1, 4), ids, slots, torch.tensor([[0.5, 0.5]]))
    assert out.tolist() == [[4.0] * 4]  # 4 x 1 in, 2 x 4 out, half of it


def test_what_a_graph_cannot_do_is_said(checkpoints, load):
    folder = checkpoints.get("qwen3_moe")
    model = load(folder, "25%", control="device")
    with pytest.raises(RefusedError, match="no decode graph for 3 rows"):
        GraphDecoder(model, 3, 64)
    with pytest.raises(RefusedError, match="no decode graph for 8 rows"):
        GraphDecoder(model, 8, 64)
    decoder = GraphDecoder(model, 1, 15)
    with pytest.raises(PromptError, match="holds 15 tokens; 16"):
        decode_greedily(decoder, ONE_PROMPT.ids, 3)
    with pytest.raises(RefusedError, match="device control plane"):
        GraphDecoder(load(folder, "25%"), 1, 64)


def test_maths_that_is_not_known_is_refused(checkpoints, load, monkeypatch):
    monkeypatch.setattr("foreroute.loading.expert_math.prove_math", lambda *_: False)
    with pytest.raises(DeviceError, match='Use control="host"'):
        load(checkpoints.get("qwen3_moe"), "25%", control="device")


def test_a_closed_tier_is_closed(checkpoints, load):
    model = load(checkpoints.get("qwen3_moe"), "25%", control="device")
    generate(model, ONE_PROMPT, 2)
    model.foreroute.close()
    model.foreroute.close()
    with pytest.raises(RefusedError):
        generate(model, ONE_PROMPT, 2)
    assert isinstance(model.foreroute.engine, device_tier.DeviceTier)
    assert EngineConfig().control == "host"
