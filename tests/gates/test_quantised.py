"""Quantised stores end to end: what is generated is what the dequantised resident model says, at every budget."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.checkpoint.codecs import CODECS
from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.records import PackedStore, store_name
from foreroute.errors import StoreError
from foreroute.kernels.torch.quant import Matrix, decode, encode
from foreroute.model.build.skeleton import outline
from foreroute.prepare.pack import pack
from foreroute.prepare.quantise import Quantiser
from tests.support.runs import ONE_PROMPT, THREE_PROMPTS, assert_same_bits, generate

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3")
QUANTS = ("int8", "int4")


def quantiser_of(checkpoint: Path, quant: str) -> Quantiser:
    sketch = outline(checkpoint, read_index(checkpoint))
    return Quantiser(sketch.table, CODECS[quant], sketch.is_transposed)


@pytest.fixture(scope="session")
def stores(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("quantised")

    def path_of(family: str, quant: str) -> Path:
        path, checkpoint = folder / f"{family}.{quant}", checkpoints.get(family, "bf16")
        if not path.exists():
            quantiser = quantiser_of(checkpoint, quant)
            pack(quantiser.source, path, progress=lambda done, total: None, quantiser=quantiser)
            assert all(0 < error.relative < 0.1 for error in quantiser.errors)
        return path

    return path_of


def dequantised(folder: Path, quant: str) -> Any:
    """transformers' resident model with every expert matrix quantised and turned back."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", dtype="auto").eval()
    for name, parameter in model.named_parameters():
        if ".experts." in name and parameter.ndim == 3:
            module = model.get_submodule(name.rpartition(".")[0])
            codec = CODECS[quant]
            for expert in parameter.data:
                rows = expert.t() if module.is_transposed else expert
                back = decode(Matrix(*encode(rows.contiguous(), codec.bits, codec.group), codec.bits, codec.group))
                expert.copy_(back if module.is_transposed else back.t())
    return model


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_the_dequantised_resident_model(family, quant, stores, checkpoints, load):
    folder = checkpoints.get(family, "bf16")
    resident = dequantised(folder, quant)
    plain = load(folder, "100%", packed="no")
    model = load(folder, "25%", packed=str(stores(family, quant)))
    assert model.foreroute.plan.stored_dtype == quant
    assert model.foreroute.plan.expert_bytes < plain.foreroute.plan.expert_bytes / {"int8": 1.8, "int4": 3}[quant]
    ids = torch.randint(5, 240, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs, ours, exact = (one(ids, use_cache=False).logits.float() for one in (resident, model, plain))
    spread = float(exact.std())
    # The median: rounding turns some random router's near ties, and moves those tokens far.
    apart = float((ours - theirs).abs().median())
    assert apart < 0.02 * spread
    if quant != "int8":
        assert apart < 0.3 * float((ours - exact).abs().median()), "no nearer to what is quantised than to what is not"
    assert model.foreroute.plan.num_slots < model.foreroute.plan.total_slots


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


def test_it_is_used_only_where_it_is_asked_for(stores, checkpoints, load, tmp_path):
    import shutil

    folder = shutil.copytree(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "model")
    shutil.copy(stores("qwen3_moe", "int4"), folder / store_name("int4"))
    assert load(folder, "50%").foreroute.plan.source == "safetensors"
    asked = load(folder, "50%", packed="int4").foreroute.plan
    assert (asked.source, asked.stored_dtype) == ("packed", "int4")
    with pytest.raises(StoreError, match=r"--quant int8"):
        load(folder, "50%", packed="int8")


def test_the_budget_is_of_the_stored_bytes(stores, checkpoints, load):
    folder = checkpoints.get("qwen3_moe", "bf16")
    plain, small = load(folder, "50%"), load(folder, "50%", packed=str(stores("qwen3_moe", "int4")))
    assert small.foreroute.plan.num_slots == plain.foreroute.plan.num_slots
    assert small.foreroute.plan.memory_bytes < plain.foreroute.plan.memory_bytes / 2


def test_another_dtype_is_refused(stores, checkpoints, load):
    with pytest.raises(StoreError, match=r"computed in bfloat16.*--dtype bfloat16"):
        load(checkpoints.get("qwen3_moe", "bf16"), packed=str(stores("qwen3_moe", "int8")), dtype="float32")


def test_another_machines_order_is_refused(stores, checkpoints, load, monkeypatch):
    from foreroute.kernels.torch import quant

    monkeypatch.setattr(quant, "order_of", lambda bits, group: "another")
    with pytest.raises(StoreError, match="another kind of CPU"):
        load(checkpoints.get("qwen3_moe", "bf16"), packed=str(stores("qwen3_moe", "int4")))


def test_another_models_store_is_refused(stores, checkpoints, load):
    with pytest.raises(StoreError, match="does not belong to this model"):
        load(checkpoints.get("qwen3_moe", "bf16", seed=1), packed=str(stores("qwen3_moe", "int4")))
    with pytest.raises(StoreError, match="does not belong to this model"):
        load(checkpoints.get("deepseek_v3", "bf16"), packed=str(stores("qwen3_moe", "int4")))


def test_a_stopped_pack_goes_on_with_the_same_bytes(stores, checkpoints, tmp_path):
    folder = checkpoints.get("qwen3_moe", "bf16")
    sketch = outline(folder, read_index(folder))
    path, seen = tmp_path / "again", []

    def stopping(done: int, total: int) -> None:
        seen.append(done)
        if done == 7 and seen.count(7) == 1:
            raise KeyboardInterrupt

    def quantiser() -> Quantiser:
        return Quantiser(sketch.table, CODECS["int4"], sketch.is_transposed)

    with pytest.raises(KeyboardInterrupt):
        pack(sketch.table, path, progress=stopping, keep_partial=True, quantiser=quantiser())
    pack(sketch.table, path, progress=stopping, quantiser=quantiser())
    assert seen[8] == 7, "it began anew"
    assert path.read_bytes() == stores("qwen3_moe", "int4").read_bytes()


def test_the_header_says_what_is_in_it(stores, checkpoints):
    path = stores("gpt_oss", "int4")
    with open(path, "rb") as file:
        _, length, _ = struct.unpack("<8sQQ", file.read(24))
        header = json.loads(file.read(length))
    assert header["codec"] == "int4"
    names = [part["name"] for part in header["layers"][0]["parts"]]
    assert names == ["gate_up_proj", "gate_up_proj.scales", "gate_up_proj_bias", "down_proj", "down_proj.scales",
                     "down_proj_bias"]  # fmt: skip
    table = outline(checkpoints.get("gpt_oss", "bf16"), read_index(checkpoints.get("gpt_oss", "bf16"))).table
    assert PackedStore(path, table).codec == "int4"


def test_a_shape_that_the_codec_cannot_take_is_named(checkpoints):
    folder = checkpoints.get("qwen3_moe", "bf16")
    sketch = outline(folder, read_index(folder))
    with pytest.raises(StoreError, match=r"int4-g128 cannot take .*gate_up_proj.*groups of 128"):
        Quantiser(sketch.table, CODECS["int4-g128"], sketch.is_transposed)


@pytest.mark.parametrize("prefetch", ["none", "lookahead"])
def test_what_a_quantised_store_reads_is_counted_to_the_byte(checkpoints, stores, load, prefetch):
    """The figures say what was moved."""
    folder = checkpoints.get("qwen3_moe", "bf16")
    model = load(folder, "25%", packed=str(stores("qwen3_moe", "int4")), prefetch=prefetch)
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


def test_biases_stay_as_they_are(checkpoints, stores):
    """gpt-oss: what is stored in bf16 lies in the quantised store byte for byte."""
    from safetensors.torch import load_file

    folder = checkpoints.get("gpt_oss", "bf16")
    table = outline(folder, read_index(folder)).table
    theirs = load_file(folder / "model.safetensors")
    store = PackedStore(stores("gpt_oss", "int4"), table)
    (read,) = store.reads_of(table)(table.num_experts + 5)
    record = store.path.read_bytes()[read.offset :][: read.nbytes]
    biases = [part for part in store.table.layers[1].layout.parts if part.name.endswith("_bias")]
    assert len(biases) == 2
    for part in biases:
        found = torch.frombuffer(bytearray(record), dtype=torch.bfloat16, count=part.shape[0], offset=part.offset)
        assert torch.equal(found, theirs[f"{table.layers[1].name}.{part.name}"][5])
