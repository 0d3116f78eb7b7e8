"""gpt-oss as it is published, in MXFP4: kept at 4.25 bits, the bits of transformers' dequantised model."""

import inspect

import pytest
import torch

from foreroute.checkpoint.assembly import Coding
from foreroute.checkpoint.records import PackedStore
from foreroute.kernels.torch.dequantise import decode_mxfp4
from tests.formats.checks import check_bytes, check_same, numbers_of
from tests.support.quantised import write_mxfp4
from tests.support.runs import THREE_PROMPTS, assert_same_bits, expert_table, generate, packed_store

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def reference(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """transformers' own dequantiser, [experts, in, out]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=dtype)


def keeps_dtype() -> bool:
    """transformers dequantises to the model's dtype; 5.17 does not yet."""
    from transformers.integrations.mxfp4 import dequantize_convertops

    return "dtype" in inspect.signature(dequantize_convertops).parameters


@pytest.mark.parametrize("num_exponents", [255, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_and_every_exponent(dtype, num_exponents):
    """All bytes under all exponents, those that overflow and those that are no longer normal among them."""
    nibbles = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    blocks = nibbles.expand(1, num_exponents, 16, 16).contiguous()
    exponents = torch.arange(num_exponents, dtype=torch.uint8)
    scales = exponents.view(1, -1, 1).expand(1, -1, 16).contiguous()
    theirs = reference(blocks, scales, DTYPES[dtype])[0]
    ours = torch.empty(num_exponents, 512, dtype=DTYPES[dtype])
    decode_mxfp4([blocks[0].reshape(num_exponents, -1), scales[0]], ours, Coding("mxfp4"))
    as_int = torch.int32 if dtype == "fp32" else torch.int16
    assert torch.equal(ours.t().contiguous().view(as_int), theirs.view(as_int))
    assert len(theirs[theirs.isfinite()].unique()) > 100


@pytest.mark.parametrize("store", ["safetensors", "packed"])
def test_records(published, store):
    """What is read into a slot, from the checkpoint or from a store, becomes the reference's numbers."""
    from safetensors.torch import load_file

    folder = published(write_mxfp4, "gpt_oss")
    table, state = expert_table(folder), load_file(folder / "model.safetensors")
    reads = table.reads if store == "safetensors" else PackedStore(packed_store(folder), table).reads_of(table)
    for key in (0, 5, table.num_keys - 1):
        layer, expert = table.expert_id(key)
        up, up_bias, down, down_bias = numbers_of(table, key, reads, torch.bfloat16)
        stem = table.layers[layer].name
        for name, ours in (("gate_up_proj", up), ("down_proj", down)):
            theirs = reference(state[f"{stem}.{name}_blocks"], state[f"{stem}.{name}_scales"], torch.bfloat16)
            assert torch.equal(ours, theirs[expert])
            assert ours.is_contiguous()
        assert torch.equal(up_bias, state[f"{stem}.gate_up_proj_bias"][expert])
        assert torch.equal(down_bias, state[f"{stem}.down_proj_bias"][expert])


@pytest.mark.parametrize("store", ["safetensors", "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_the_dequantised_resident_model(published, references, load, dtype, store):
    if dtype != "bf16" and not keeps_dtype():
        pytest.skip("this transformers makes bfloat16 experts whatever dtype the model has, and cannot run them")
    folder = published(write_mxfp4, "gpt_oss", dtype)
    model = check_same(load, folder, lambda batch: references.output(folder, batch), "mxfp4", store)
    biases = sum(shape[0] for shape in ((64,), (64,))) * (4 if dtype == "fp32" else 2)
    check_bytes(model, 4.25, biases)


def test_where_the_familys_own_forward_runs(published, references, load, monkeypatch):
    """Its tensors are made of what is stored, one expert at a time."""
    monkeypatch.setattr("foreroute.loading.expert_math.prove_math", lambda *_: False)
    folder = published(write_mxfp4, "gpt_oss")
    model = load(folder, "25%", math="torch")
    assert model.foreroute.plan.math == "family"
    assert_same_bits(generate(model, THREE_PROMPTS), references.output(folder, THREE_PROMPTS))
    assert model.foreroute.stats().evictions > 0
