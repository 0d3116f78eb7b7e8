"""On a GPU: greedy tokens are those of the resident model, for families, dtypes, residencies and control planes."""

from typing import Any

import pytest
import torch

from foreroute.generation.graph_decoder import GraphDecoder
from tests.support.runs import ONE_PROMPT, THREE_PROMPTS, decode_greedily

NEW_TOKENS = 64
FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]
# As few slots as the tier takes: the demand of one token.
RESIDENCIES = ["min", "25%", "100%"]


@pytest.fixture(scope="module")
def resident():
    """Greedy tokens of transformers' own model, on the GPU, by folder and batch; each made once."""
    made: dict[Any, torch.Tensor] = {}

    def tokens(folder, batch) -> torch.Tensor:
        from transformers import AutoModelForCausalLM

        if (folder, id(batch)) not in made:
            model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", dtype="auto")
            made[folder, id(batch)] = greedy(model.eval().cuda(), batch)
        return made[folder, id(batch)]

    return tokens


def greedy(model, batch) -> torch.Tensor:
    out = model.generate(
        batch.ids.cuda(),
        attention_mask=batch.mask.cuda(),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        disable_compile=True,
    )
    return out[:, batch.ids.shape[1] :].cpu()


def budget(load, folder, residency: str, **switches) -> int | str:
    if residency != "min":
        return residency
    plan = load(folder, "100%", **switches).foreroute.plan
    return plan.token_demand_slots * plan.slot_bytes


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("control", ["host", "device"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_the_resident_models(checkpoints, resident, load, family, dtype, control, residency):
    folder = checkpoints.get(family, dtype)
    memory = budget(load, folder, residency, device="cuda")
    model = load(folder, memory, device="cuda", control=control)
    for batch in (ONE_PROMPT, THREE_PROMPTS):
        assert greedy(model, batch).tolist() == resident(folder, batch).tolist()
    stats = model.foreroute.stats()
    assert (stats.evictions > 0) == (residency != "100%")
    assert stats.decode.hits > 0


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_a_graph(checkpoints, resident, load, family, dtype, residency):
    folder = checkpoints.get(family, dtype)
    memory = budget(load, folder, residency, device="cuda")
    model = load(folder, memory, device="cuda", control="device")
    decoder = GraphDecoder(model, 1, 128)
    expected = resident(folder, ONE_PROMPT).tolist()
    for _ in range(2):
        assert decode_greedily(decoder, ONE_PROMPT.ids, NEW_TOKENS).tolist() == expected
    assert decoder.is_captured
    assert model.foreroute.stats().decode.misses > 0


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_a_graph_per_batch_size(checkpoints, resident, load, rows):
    folder = checkpoints.get("qwen3_moe")
    model = load(folder, "100%", device="cuda", control="device", prefetch="none")
    assert rows <= model.foreroute.engine.most_rows
    decoder = GraphDecoder(model, rows, 128)
    expected = resident(folder, ONE_PROMPT).expand(rows, -1).tolist()
    assert decode_greedily(decoder, ONE_PROMPT.ids.expand(rows, -1), NEW_TOKENS).tolist() == expected


def test_three_tiers(checkpoints, resident, load):
    folder = checkpoints.get("qwen3_moe")
    model = load(folder, "25%", device="cuda", control="host", host_memory="30%")
    assert model.foreroute.plan.host_records < model.foreroute.plan.total_slots
    assert greedy(model, THREE_PROMPTS).tolist() == resident(folder, THREE_PROMPTS).tolist()
