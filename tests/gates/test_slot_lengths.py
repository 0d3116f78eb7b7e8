"""Layers whose experts differ in size: slots of each length, and the same bits in all of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foreroute.prepare.pack import pack
from foreroute.residency.sized import SizedResidency
from tests.support.runs import ONE_PROMPT, THREE_PROMPTS, Output, assert_same_bits, expert_table, generate

gguf_writer = pytest.importorskip("tests.formats.gguf_writer")
Kind = gguf_writer.Kind
# Bytes of a slot: three matrices of 256 x 256, of which the last one takes more in the layer in the middle.
SHORT, LONG = 3 * 36864, 131072
LAYERS, EXPERTS, TOP_K = 3, 8, 2
WHOLE = EXPERTS * (2 * SHORT + LONG)


@pytest.fixture(scope="module")
def mixed(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A file whose middle layer stores down in Q6_K, the others in Q4_K."""
    folder = tmp_path_factory.mktemp("mixed")
    return gguf_writer.write_gguf(folder, "qwen3moe", Kind.Q4_K, down=[Kind.Q4_K, Kind.Q6_K, Kind.Q4_K])


@pytest.fixture(scope="module")
def resident(mixed: Any) -> dict[str, Output]:
    """What the dequantised resident model says after one prompt and after three."""
    return {name: generate(mixed.resident, batch) for name, batch in BATCHES.items()}


BATCHES = {"one": ONE_PROMPT, "three": THREE_PROMPTS}
ON_TORCH = {"dtype": "float32", "math": "torch"}


def test_slots_are_as_long_as_their_layers_experts(mixed: Any, load: Callable[..., Any]) -> None:
    plan = load(mixed.path, "50%", **ON_TORCH).foreroute.plan
    assert plan.slot_classes == ((LONG, EXPERTS // 2), (SHORT, EXPERTS))
    assert (plan.memory_bytes, plan.pool_bytes, plan.all_slot_bytes) == (WHOLE // 2, WHOLE // 2, WHOLE)
    assert plan.num_slots == LAYERS * EXPERTS // 2 > plan.pool_bytes // LONG
    assert plan.token_slot_bytes == TOP_K * (2 * SHORT + LONG)
    assert load(mixed.path, "100%", **ON_TORCH).foreroute.plan.num_slots == LAYERS * EXPERTS


@pytest.mark.parametrize(
    ("memory", "prefetch", "batch"),
    [("25%", "lookahead", "three"), ("40%", "none", "one"), ("40%", "lookahead", "one"), ("60%", "lookahead", "three")],
)
def test_tokens_are_the_resident_models(
    mixed: Any, resident: dict[str, Output], load: Callable[..., Any], memory: str, prefetch: str, batch: str
) -> None:
    """At a quarter, each layer of three rows demands more than its length has slots: experts pass through them."""
    model = load(mixed.path, memory, prefetch=prefetch, **ON_TORCH)
    assert_same_bits(generate(model, BATCHES[batch]), resident[batch])
    residency, decode = model.foreroute.engine.pool.residency, model.foreroute.stats().decode
    assert isinstance(residency, SizedResidency)
    assert decode.misses > 0
    assert (decode.prefetch_used > 0) == (prefetch != "none" and memory != "25%")
    if memory != "25%":
        assert all(part.evictions for part in residency.parts), "each length's slots were used again"


@pytest.mark.parametrize("batch", BATCHES)
def test_ggml_multiplies_in_slots_of_each_length(mixed: Any, load: Callable[..., Any], batch: str) -> None:
    pytest.importorskip("libggml")
    expected = generate(load(mixed.path, "100%", math="ggml"), BATCHES[batch])
    for memory, prefetch in (("40%", "none"), ("60%", "lookahead")):
        model = load(mixed.path, memory, math="ggml", prefetch=prefetch)
        assert model.foreroute.plan.math == "ggml"
        assert len(model.foreroute.plan.slot_classes) == 2
        assert_same_bits(generate(model, BATCHES[batch]), expected)
        assert all(part.evictions for part in model.foreroute.engine.pool.residency.parts)


def test_a_packed_store_is_read_into_them(
    mixed: Any, resident: dict[str, Output], load: Callable[..., Any], tmp_path: Path
) -> None:
    store = tmp_path / "experts.foreroute"
    pack(expert_table(mixed.path), store, progress=lambda done, total: None)
    model = load(mixed.path, "40%", packed=str(store), **ON_TORCH)
    assert model.foreroute.plan.source == "packed"
    assert model.foreroute.plan.slot_classes[1][0] == SHORT
    assert_same_bits(generate(model), resident["one"])


@pytest.mark.parametrize("math", ["torch", "ggml"])
def test_behind_a_host_tier_slots_are_of_one_length(mixed: Any, load: Callable[..., Any], math: str) -> None:
    if math == "ggml":
        pytest.importorskip("libggml")
    settings = {"dtype": "float32", "math": math}
    model = load(mixed.path, "50%", host_memory="80%", **settings)
    assert model.foreroute.plan.slot_classes == ((LONG, LAYERS * EXPERTS // 2),)
    assert model.foreroute.plan.all_slot_bytes == LAYERS * EXPERTS * LONG
    assert_same_bits(generate(model), generate(load(mixed.path, "100%", **settings)))
