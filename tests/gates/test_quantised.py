"""Quantised stores end to end: what is generated is what the dequantised resident model says, at every budget."""

import json
import shutil
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import load_file

from foreroute.checkpoint.codecs import CODECS
from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.records import PackedStore, store_name
from foreroute.errors import StoreError
from foreroute.model.build.skeleton import outline
from foreroute.prepare.pack import pack
from tests.formats.gguf_writer import qwen3_moe_config
from tests.support.checkpoints import random_model, save_checkpoint, save_tokenizer
from tests.support.packs import dequantised, pack_quantised, quantiser_of, quiet
from tests.support.runs import ONE_PROMPT, THREE_PROMPTS, assert_same_bits, expert_table, generate

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3")
QUANTS = ("q8_0", "q4_0")


@pytest.fixture(scope="session")
def stores(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("quantised")

    def path_of(family: str, quant: str) -> Path:
        path, checkpoint = folder / f"{family}.{quant}", checkpoints.get(family, "bf16")
        if not path.exists():
            quantiser = quantiser_of(checkpoint, quant)
            pack(quantiser.source, path, progress=quiet, quantiser=quantiser)
            assert quantiser.is_measured
            most = {"q8_0": 0.01, "q4_0": 0.1, "q4_1": 0.1, "mxfp4": 0.15}[quant]
            assert all(most / 10 < error.relative < most for error in quantiser.errors)
        return path

    return path_of


@pytest.fixture(scope="session")
def wide(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose rows are whole blocks of 256."""
    folder = save_checkpoint(random_model(qwen3_moe_config(), 0), tmp_path_factory.mktemp("wide") / "model", "bf16")
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("quant", [*QUANTS, "mxfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_torch_the_bits_of_the_dequantised_resident_model(family, quant, stores, checkpoints, load):
    """Quantised and turned back by the gguf package, by transformers' own maths."""
    folder, packed = checkpoints.get(family, "bf16"), str(stores(family, quant))
    model = load(folder, "25%", packed=packed, math="torch")
    assert (model.foreroute.plan.stored_dtype, model.foreroute.plan.math) == (quant, "own")
    assert_same_bits(generate(model), generate(dequantised(folder, quant)))
    assert model.foreroute.stats().evictions > 0


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_ggml_nearly_the_dequantised_resident_model(family, quant, stores, checkpoints, load):
    """Activations are rounded to 8 bits inside a product: as far as that, and not as far as what is not quantised."""
    folder = checkpoints.get(family, "bf16")
    model = load(folder, "25%", packed=str(stores(family, quant)))
    exact = load(folder, "100%", packed="no")
    assert model.foreroute.plan.math == "ggml"
    ids = torch.randint(5, 240, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs, ours, plain = (
            one(ids, use_cache=False).logits.float() for one in (dequantised(folder, quant), model, exact)
        )
    # The median: rounding turns some random router's near ties, and moves those tokens far.
    apart = float((ours - theirs).abs().median())
    assert apart < 0.05 * float(plain.std())
    if quant != "q8_0":
        assert apart < 0.3 * float((ours - plain).abs().median()), "no nearer to what is quantised than to what is not"


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_at_every_budget(family, quant, stores, checkpoints, load):
    folder, packed = checkpoints.get(family, "bf16"), str(stores(family, quant))
    whole = load(folder, "100%", packed=packed)
    for batch in (ONE_PROMPT, THREE_PROMPTS):
        expected = generate(whole, batch)
        for memory, prefetch in (("25%", "lookahead"), ("50%", "none")):
            model = load(folder, memory, packed=packed, prefetch=prefetch)
            assert_same_bits(generate(model, batch), expected)
            assert model.foreroute.stats().evictions > 0


@pytest.mark.parametrize("quant", ["q2_k", "q5_k", "iq4_xs", "q4_k_m"])
def test_types_of_blocks_of_256(wide, quant, load, tmp_path):
    """With torch the resident model's bits, and with ggml near them."""
    packed = str(pack_quantised(wide, quant, tmp_path / "store"))
    by_torch = load(wide, "50%", packed=packed, math="torch")
    assert_same_bits(generate(by_torch, new_tokens=6), generate(dequantised(wide, quant), new_tokens=6))
    by_ggml = load(wide, "50%", packed=packed)
    assert by_ggml.foreroute.plan.math == "ggml"
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        ours, theirs = by_ggml(ids).logits.float(), by_torch(ids).logits.float()
    assert float((ours - theirs).abs().median()) < 0.06 * float(theirs.std())


def test_a_mixture_has_more_bits_where_llama_cpp_has(wide):
    """Of eight layers the first, the last, and every third between them; of three the last."""
    down = ["Q6_K" if CODECS["q4_k_m"].kind_of("down_proj", at, 8) == "Q6_K" else "" for at in range(8)]
    assert [at for at, kind in enumerate(down) if kind] == [0, 3, 6, 7]
    table = quantiser_of(wide, "q4_k_m").table
    kinds = [[part.matrices[0].coding.kind for part in layer.parts] for layer in table.layers]
    assert kinds == [["gguf:Q4_K", "gguf:Q4_K"], ["gguf:Q4_K", "gguf:Q4_K"], ["gguf:Q4_K", "gguf:Q6_K"]]


def test_it_is_used_only_where_it_is_asked_for(stores, checkpoints, load, tmp_path, caplog):
    folder = shutil.copytree(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "model")
    shutil.copy(stores("qwen3_moe", "q4_0"), folder / store_name("q4_0"))
    shutil.copy(stores("deepseek_v3", "q4_0"), folder / store_name("q8_0"))
    assert load(folder, "50%").foreroute.plan.source == "safetensors"
    assert caplog.text.count("a quantised packed store is beside it and is not used") == 1
    assert "--packed q4_0 uses it" in caplog.text, "that of other weights is not named"
    (folder / store_name("q8_0")).unlink()
    asked = load(folder, "50%", packed="q4_0").foreroute.plan
    assert (asked.source, asked.stored_dtype) == ("packed", "q4_0")
    shutil.copy(stores("qwen3_moe", "q4_1"), folder / store_name("q4_1"))
    assert load(folder, "50%", packed="int4").foreroute.plan.stored_dtype == "q4_1", "by its name of earlier versions"
    with pytest.raises(StoreError, match=r"--quant q8_0"):
        load(folder, "50%", packed="int8")


def test_the_budget_is_of_the_stored_bytes(stores, checkpoints, load):
    folder = checkpoints.get("qwen3_moe", "bf16")
    plain, small = load(folder, "50%"), load(folder, "50%", packed=str(stores("qwen3_moe", "q4_0")))
    assert small.foreroute.plan.num_slots == plain.foreroute.plan.num_slots
    assert small.foreroute.plan.memory_bytes < plain.foreroute.plan.memory_bytes / 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_dtype_computes_with_it(stores, checkpoints, load, dtype):
    model = load(checkpoints.get("qwen3_moe", "bf16"), packed=str(stores("qwen3_moe", "q8_0")), dtype=dtype)
    assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_another_models_store_is_refused(stores, checkpoints, load):
    with pytest.raises(StoreError, match="does not belong to this model"):
        load(checkpoints.get("qwen3_moe", "bf16", seed=1), packed=str(stores("qwen3_moe", "q4_0")))
    with pytest.raises(StoreError, match="does not belong to this model"):
        load(checkpoints.get("deepseek_v3", "bf16"), packed=str(stores("qwen3_moe", "q4_0")))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_same_bytes_with_any_number_of_threads(stores, checkpoints, family, tmp_path):
    folder = checkpoints.get(family, "bf16")
    for num_threads in (2, 5):
        path = pack_quantised(folder, "q4_0", tmp_path / str(num_threads), num_threads)
        assert path.read_bytes() == stores(family, "q4_0").read_bytes()


def test_a_stopped_pack_goes_on_with_the_same_bytes(stores, checkpoints, tmp_path):
    folder = checkpoints.get("qwen3_moe", "bf16")
    path, seen = tmp_path / "again", []

    def stopping(done: int, total: int) -> None:
        seen.append(done)
        if done == 7 and seen.count(7) == 1:
            raise KeyboardInterrupt

    quantiser = quantiser_of(folder, "q4_0", 3)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        pack(quantiser.source, path, progress=stopping, keep_partial=True, quantiser=quantiser)
    assert torch.get_num_threads() == threads
    assert not [thread for thread in threading.enumerate() if "quantise" in thread.name]
    pack(quantiser.source, path, progress=stopping, quantiser=quantiser_of(folder, "q4_0", 2))
    assert seen[8] == 7, "it began anew"
    assert path.read_bytes() == stores("qwen3_moe", "q4_0").read_bytes()


def test_the_header_says_what_is_in_it(stores, checkpoints):
    path = stores("gpt_oss", "q4_0")
    with open(path, "rb") as file:
        _, length, _ = struct.unpack("<8sQQ", file.read(24))
        header = json.loads(file.read(length))
    assert header["codec"] == "q4_0"
    names = [part["name"] for part in header["layers"][0]["parts"]]
    assert names == ["gate_up_proj.0", "gate_up_proj.1", "gate_up_proj_bias.0", "gate_up_proj_bias.1", "down_proj.0",
                     "down_proj_bias.0"]  # fmt: skip
    assert header["layers"][0]["tensors"][0] == {
        "name": "gate_up_proj", "blocks": ["Q4_0", "Q4_0"], "is_interleaved": True, "is_transposed": True,
    }  # fmt: skip
    table = outline(checkpoints.get("gpt_oss", "bf16"), read_index(checkpoints.get("gpt_oss", "bf16"))).table
    assert PackedStore(path, table).codec == "q4_0"


def test_blocks_are_the_gguf_packages(checkpoints, stores):
    """Read from the store and turned into numbers by the package: those of the checkpoint, quantised by it."""
    folder = checkpoints.get("gpt_oss", "bf16")
    table = quantiser_of(folder, "q8_0").table
    store = PackedStore(stores("gpt_oss", "q8_0"), expert_table(folder))
    (read,) = store.reads_of(table)(table.keys.key(2, 5))
    raw = np.fromfile(read.path, np.uint8, count=read.nbytes, offset=read.offset)
    state = load_file(folder / "model.safetensors")
    stored = state["model.layers.2.mlp.experts.gate_up_proj"][5]  # [hidden, gate and up in turn]
    for which, part in enumerate(table.layers[2].layout.parts[:2]):
        rows = stored.t()[which::2].float().contiguous()
        blocks = raw[part.offset : part.offset + part.nbytes].reshape(part.shape)
        assert (blocks == quantize(rows.numpy(), GGMLQuantizationType.Q8_0)).all()
    biases = state["model.layers.2.mlp.experts.gate_up_proj_bias"][5].float()
    part = table.layers[2].layout.parts[3]
    assert raw[part.offset : part.offset + part.nbytes].view(np.float32).tolist() == biases[1::2].tolist()


@pytest.mark.parametrize("prefetch", ["none", "lookahead"])
def test_what_a_quantised_store_reads_is_counted_to_the_byte(checkpoints, stores, load, prefetch):
    """The figures say what was moved."""
    folder = checkpoints.get("qwen3_moe", "bf16")
    model = load(folder, "25%", packed=str(stores("qwen3_moe", "q4_0")), prefetch=prefetch)
    transfer, moved = model.foreroute.engine.pool.transfer, {"demand": 0, "prefetch": 0}
    sizes = [layer.expert_nbytes for layer in model.foreroute.table.layers for _ in range(layer.num_experts)]
    demand, guess, cancel = transfer.demand, transfer.prefetch, transfer.cancel

    def noting(kind: str, start: Any, sign: int = 1) -> Any:
        def noted(key: int, *slot: int) -> Any:
            done = start(key, *slot)
            moved[kind] += sign * sizes[key] if sign > 0 or done else 0
            return done

        return noted

    transfer.demand = noting("demand", demand)
    transfer.prefetch = noting("prefetch", guess)
    transfer.cancel = noting("prefetch", cancel, -1)
    generate(model, ONE_PROMPT)
    phases = (model.foreroute.stats().prefill, model.foreroute.stats().decode)
    assert sum(phase.demand_bytes for phase in phases) == moved["demand"]
    assert sum(phase.prefetch_bytes for phase in phases) == moved["prefetch"]
    assert phases[1].demand_bytes > 0
    assert (moved["prefetch"] > 0) == (prefetch == "lookahead")
