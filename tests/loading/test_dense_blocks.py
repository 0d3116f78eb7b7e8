"""`dense="q8_0"`: dense weights of safetensors in blocks, quantised when they are loaded."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from foreroute.checkpoint.locate import read_index
from foreroute.errors import CorruptCheckpointError, ForerouteError, UnsupportedModelError
from foreroute.kernels.ggml.linear import BlockEmbedding, BlockLinear
from foreroute.model.build.skeleton import outline
from tests.formats.gguf_writer import Kind, write_gguf
from tests.support.broken import copied
from tests.support.checkpoints import edit_json
from tests.support.families import FAMILIES
from tests.support.packs import numbers_again, pack_quantised
from tests.support.runs import assert_same_bits, generate

ROUTERS = re.compile(r"gate$|router$|_gate$")


def of_blocks(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, (BlockLinear, BlockEmbedding))}


def quantised_state(folder: Path, names: list[str], kind: str) -> dict[str, torch.Tensor]:
    state = load_file(folder / "model.safetensors")
    for name in names:
        state[name] = numbers_again(state[name], kind)
    return state


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_near_its_dequantised_self(family, checkpoints, load, tmp_path):
    """The same weights as floats that lie on the blocks' numbers: what differs is the rounding of activations."""
    folder = checkpoints.get(family)
    model = load(folder, "50%", dense="q8_0")
    kept = of_blocks(model)
    assert {type(module) for module in kept.values()} == {BlockLinear, BlockEmbedding}
    assert not [name for name in kept if ROUTERS.search(name)]
    stored = outline(folder, read_index(folder)).linear.stored
    assert {f"{name}.weight" for name in kept} == stored.keys()
    twin = copied(folder, tmp_path / "twin")
    save_file(quantised_state(folder, [*stored.values()], "Q8_0"), twin / "model.safetensors", {"format": "pt"})
    ids = torch.randint(5, 240, (1, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, theirs = model(ids).logits, load(twin, "50%")(ids).logits
    assert ours.dtype == torch.float32
    assert float((ours - theirs).abs().median()) < 0.05 * float(theirs.std())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_same_bits_at_every_budget(family, checkpoints, load):
    folder = checkpoints.get(family, "bf16")
    whole, part = load(folder, "100%", dense="q5_1"), load(folder, "25%", dense="q5_1")
    assert_same_bits(generate(part), generate(whole))
    assert part.foreroute.stats().evictions > 0


def test_memory_is_that_of_blocks(checkpoints, load):
    folder = checkpoints.get("qwen3_moe", "bf16")
    floats, blocks = load(folder, dense="stored").foreroute.plan, load(folder, dense="q4_0").foreroute.plan
    assert blocks.dense_bytes < 0.5 * floats.dense_bytes
    model = load(folder, dense="q8_0")
    assert model.dtype == torch.bfloat16, "another dtype would convert every expert at every use"
    held = sum(module.matrix.blocks.nbytes for module in of_blocks(model).values())
    floats_left = sum(one.numel() * one.element_size() for one in model.parameters())
    assert model.foreroute.plan.dense_bytes == held + floats_left


@pytest.mark.parametrize("stored", ["no head", "the same", "another"])
def test_a_tied_head_shares_the_embeddings_blocks(stored, checkpoints, load, tmp_path):
    """Unless the checkpoint has another one, which transformers takes then; and the config stays as it was."""
    folder = copied(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "tied")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    state = load_file(folder / "model.safetensors")
    if stored == "no head":
        del state["lm_head.weight"]
    elif stored == "the same":
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    model = load(folder, dense="q8_0")
    assert (model.lm_head.matrix is model.model.embed_tokens.matrix) == (stored != "another")
    assert model.config.tie_word_embeddings is True
    ids = torch.arange(9)[None]
    with torch.no_grad():
        ours, theirs = model(ids).logits, load(folder, math="torch")(ids).logits
    assert float((ours - theirs).abs().median()) < 0.05 * float(theirs.std())


def test_beside_quantised_experts(checkpoints, load, tmp_path):
    folder = copied(checkpoints.get("gpt_oss", "bf16"), tmp_path / "model")
    pack_quantised(folder, "q4_0")
    model = load(folder, "25%", packed="q4_0", dense="q8_0")
    plan = model.foreroute.plan
    assert (plan.stored_dtype, plan.math, plan.compute_dtype) == ("q4_0", "ggml", "float32")
    assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_what_cannot_be(checkpoints, load, tmp_path):
    folder = checkpoints.get("qwen3_moe", "bf16")
    with pytest.raises(ForerouteError, match="dense='q9' is not known"):
        load(folder, dense="q9")
    with pytest.raises(UnsupportedModelError, match=r"dense=\"q8_0\", which ggml.* compute: torch was asked for"):
        load(folder, dense="q8_0", math="torch")
    with pytest.raises(
        UnsupportedModelError, match=r"dense=\"q6_k\" cannot take .*64 weights.*256. dense=\"q4_0\", .*mxfp4 can"
    ):
        load(folder, dense="q6_k")
    written = write_gguf(tmp_path / "gguf", "gpt-oss", Kind.Q8_0)
    with pytest.raises(UnsupportedModelError, match=r"dense=\"q8_0\": .*GGUF file stay in its own blocks"):
        load(written.path, dense="q8_0")


def test_a_weight_that_is_no_number(checkpoints, load, tmp_path):
    folder = copied(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.self_attn.q_proj.weight"][3, 5] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CorruptCheckpointError, match=r"layers.1.self_attn.q_proj.weight: a weight is nan.*without dense="
    ):
        load(folder, dense="q8_0")


def test_eval_prices_it(checkpoints, capfd, tmp_path):
    from foreroute.cli.main import main

    folder, text = checkpoints.get("qwen3_moe", "bf16"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 8)
    found = {}
    for dense in ("stored", "q4_0"):
        flags = ("--windows", "2", "--context", "40", "--threads", "1", "--dense", dense, "--json")
        assert main(["eval", str(folder), "--text", str(text), *flags]) == 0
        found[dense] = json.loads(capfd.readouterr().out)["bits_per_char"]["all"]
    assert 0 < abs(found["q4_0"] - found["stored"]) < 0.2 * found["stored"]
