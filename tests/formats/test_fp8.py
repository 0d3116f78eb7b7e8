"""FP8 with a scale per block, as DeepSeek-V3 and Qwen3-*-FP8 are published: 8 bits and the scales, wherever kept."""

import json

import pytest
import torch
from safetensors.torch import load_file

from foreroute.checkpoint.assembly import Coding
from foreroute.checkpoint.records import PackedStore
from foreroute.kernels.torch.dequantise import decode_fp8
from tests.formats.checks import check_bytes, check_same, numbers_of
from tests.support.checkpoints import edit_json
from tests.support.quantised import fp8_blocks, rewritten, write_fp8
from tests.support.runs import assert_same_bits, expert_table, generate, packed_store

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FAMILIES = ("qwen3_moe", "deepseek_v3")


def reference(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """transformers' own dequantiser."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(values, scales, output_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_every_number(dtype):
    """All 256 eight-bit floats under scales of many sizes."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).expand(64, 256).contiguous()
    scales = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).exp() * 1e-3
    ours = torch.empty(64, 256, dtype=dtype)
    decode_fp8([values, scales], ours, Coding("fp8", (16, 16)))
    assert torch.equal(ours.nan_to_num(7), reference(values, scales, dtype).nan_to_num(7))


def test_blocks_that_the_matrix_cuts_off():
    """Each number takes the scale of the block of 128 that it is in, as DeepSeek-V3's 576 rows need it."""
    weights = torch.randn(192 + 64, 128 + 72, generator=torch.Generator().manual_seed(2))[:200]
    values, scales = fp8_blocks(weights, 128)
    ours = torch.empty(200, 200)
    decode_fp8([values, scales], ours, Coding("fp8", (128, 128)))
    for row, column in ((0, 0), (127, 127), (128, 0), (199, 199), (130, 128)):
        assert ours[row, column] == values[row, column].float() * scales[row // 128, column // 128]
    assert float((ours - weights).abs().max()) < 0.2


@pytest.mark.parametrize("store", ["safetensors", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_records(published, family, store):
    folder = published(write_fp8, family)
    table, state = expert_table(folder), load_file(folder / "model.safetensors")
    reads = table.reads if store == "safetensors" else PackedStore(packed_store(folder), table).reads_of(table)
    for key in (0, 7, table.num_keys - 1):
        layer, expert = table.expert_id(key)
        up, down = numbers_of(table, key, reads, torch.bfloat16)
        stem = f"{table.layers[layer].name}.{expert}"
        made = [
            reference(state[name], state[f"{name}_scale_inv"], torch.bfloat16)
            for name in (f"{stem}.{which}_proj.weight" for which in ("gate", "up", "down"))
        ]
        assert torch.equal(up, torch.cat(made[:2]))
        assert torch.equal(down, made[2])


@pytest.mark.parametrize("store", ["safetensors", "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_the_dequantised_resident_model(published, references, load, family, dtype, store):
    folder = published(write_fp8, family, dtype)
    model = check_same(load, folder, lambda batch: references.output(folder, batch), "fp8", store)
    check_bytes(model, 8 + 32 / 16**2)


def test_a_layer_that_is_not_quantised(published, checkpoints, references, load, tmp_path):
    """As modules_to_not_convert names it: its attention and experts are stored as numbers."""
    numbers = {
        name: one
        for name, one in load_file(checkpoints.get("qwen3_moe", "bf16") / "model.safetensors").items()
        if ".layers.0." in name
    }

    def change(state):
        return {name: one for name, one in state.items() if ".layers.0." not in name} | numbers

    folder = rewritten(published(write_fp8, "qwen3_moe"), tmp_path / "parts", change)
    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    declared["modules_to_not_convert"] = ["lm_head", "gate", "model.layers.0"]
    edit_json(folder / "config.json", quantization_config=declared)
    assert [layer.stored_as for layer in expert_table(folder).layers[:2]] == ["", "fp8"]
    assert_same_bits(generate(load(folder)), references.output(folder))


def test_dense_weights_are_those_of_the_resident_model(published, references, load):
    """Attention, shared experts and dense layers are stored in FP8 too, and are numbers once loaded."""
    folder = published(write_fp8, "deepseek_v3")
    theirs, ours = dict(references.model(folder).named_parameters()), dict(load(folder).named_parameters())
    assert set(theirs) - set(ours) == {name for name in theirs if ".experts." in name}
    for name, parameter in ours.items():
        assert parameter.dtype == theirs[name].dtype
        assert torch.equal(parameter, theirs[name]), name
