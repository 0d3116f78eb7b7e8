"""Four-bit integers and row-scaled FP8 as GPTQ and compressed-tensors publish them, kept as they are stored.

The reference is the same checkpoint with every quantised matrix made a number by other code than ours, as a plain one.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foreroute.checkpoint.assembly import Coding
from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.quantised_formats import QuantisedFormat, read_format
from foreroute.errors import CorruptCheckpointError
from foreroute.kernels.torch.dequantise import decode_fp8_scaled, decode_gptq_int4
from tests.formats.checks import check_bytes, check_same
from tests.formats.plain import FORMATS, State, plain
from tests.support.quantised import rewritten, words, write_gptq, write_packed_int4
from tests.support.runs import ONE_PROMPT, assert_same_bits, generate


@pytest.mark.parametrize("store", ["safetensors", "packed"])
@pytest.mark.parametrize("name", FORMATS)
def test_as_the_dequantised_resident_model(published, references, load, tmp_path, name, store):
    write, _, _, bits = FORMATS[name]
    folder = published(write, "qwen3_moe")
    reference = plain(folder, name, tmp_path / "plain")
    model = check_same(load, folder, lambda batch: references.output(reference, batch), name, store)
    # A scale of 2 bytes for each of 64 + 64 + 64 rows or so, over 3 matrices of 2048 weights.
    check_bytes(model, bits or 8 + 16 * (32 + 32 + 64) / (3 * 2048))


@pytest.mark.parametrize(("name", "group"), [("gptq", -1), ("gptq", 1024), ("awq", -1)])
def test_a_group_that_is_the_whole_row(published, references, load, tmp_path, name, group):
    """GPTQ numbers groups by division: 1024 columns of 64 are those 64. Both formats say -1 for the row."""
    write = FORMATS[name][0]
    rows = tmp_path / "rows"

    def whole(source: Path, folder: Path) -> Path:
        # A row of one matrix is shorter than one of another; each of them is a group.
        return write(source, folder, 0)

    whole(plain(published(write, "qwen3_moe"), name, tmp_path / "numbers"), rows)
    config = json.loads((rows / "config.json").read_text())
    config["quantization_config"]["group_size"] = group
    (rows / "config.json").write_text(json.dumps(config))
    reference = plain(rows, name, tmp_path / "plain")
    assert_same_bits(generate(load(rows, "25%"), ONE_PROMPT), references.output(reference, ONE_PROMPT))


@pytest.mark.parametrize("store", ["safetensors", "packed"])
def test_a_last_group_of_fewer_columns(checkpoints, references, load, tmp_path, store):
    """As AutoGPTQ writes it: 64 columns in groups of 24 are 24, 24 and 16, and 32 are 24 and 8."""
    folder = write_gptq(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "ragged", 24)
    scales = {one.shape[0] for name, one in load_file(folder / "model.safetensors").items() if name.endswith("scales")}
    assert scales == {2, 3}
    reference = plain(folder, "gptq", tmp_path / "plain")
    check_same(load, folder, lambda batch: references.output(reference, batch), "gptq", store)


@pytest.mark.parametrize("is_shifted", [True, False])
def test_gptq_zero_points_of_zero(is_shifted):
    """GPTQ's first format keeps zero points less one: of zero, by a borrow from the word's next one."""
    zeros = torch.tensor([[0, 8, 15, 0, 0, 7, 1, 0]])
    steps = torch.arange(64).view(8, 8) % 16  # [input, output]
    scales = torch.full((1, 8), 0.5, dtype=torch.float16)
    stored = words(zeros) - 0x11111111 if is_shifted else words(zeros)
    ours = torch.empty(8, 8)
    coding = Coding("gptq-int4", (1, 8), is_zero_shifted=is_shifted)
    decode_gptq_int4([words(steps.t().contiguous()).t().contiguous(), scales, stored], ours, coding)
    assert torch.equal(ours, 0.5 * (steps - zeros).t())


@pytest.mark.parametrize("order", ["weight", "static", None, False])
def test_packed_int4_that_was_only_rounded_in_another_order(published, tmp_path, order):
    """With "weight" the columns lie as they always do, and there is no g_idx: most w4a16 checkpoints say so."""
    folder = shutil.copytree(published(write_packed_int4, "qwen3_moe"), tmp_path / "ordered")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = order
    (folder / "config.json").write_text(json.dumps(config))
    assert isinstance(read_format(folder, read_index(folder)), QuantisedFormat)


@pytest.mark.parametrize(
    ("strategy", "block", "scales_shape"),
    [("tensor", (0, 0), (1,)), ("channel", (1, 0), (40, 1)), ("block", (16, 16), (3, 2))],
)
def test_float_quantised_scales_of_every_kind(strategy, block, scales_shape):
    """One for the matrix, one a row, one a block; the last blocks of 40 rows and 24 columns are cut off."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(40, 24, generator=generator).to(torch.float8_e4m3fn)
    scales = (torch.rand(scales_shape, generator=generator) + 0.1).bfloat16()
    ours = torch.empty(40, 24, dtype=torch.bfloat16)
    decode_fp8_scaled([values, scales], ours, Coding("fp8-scaled", block))
    by_row = {"tensor": lambda i, j: scales[0], "channel": lambda i, j: scales[i, 0]}
    of = by_row.get(strategy, lambda i, j: scales[i // 16, j // 16])
    theirs = torch.stack([torch.stack([values[i, j].bfloat16() * of(i, j) for j in range(24)]) for i in range(40)])
    assert torch.equal(ours, theirs)


def with_biases(value: float) -> Callable[[State], State]:
    def change(state: State) -> State:
        scales = {name: tensor for name, tensor in state.items() if name.endswith(".scales")}
        biases = {name.replace(".scales", ".bias"): torch.full(one.shape[1:], value) for name, one in scales.items()}
        return {**state, **{name: one.half() for name, one in biases.items()}}

    return change


def test_zero_biases_that_the_model_lacks(published, load, references, tmp_path):
    """Older writers of GPTQ gave every matrix a bias, Qwen1.5-MoE's among them."""
    plain_folder = plain(published(write_gptq, "qwen3_moe"), "gptq", tmp_path / "plain")
    biased = rewritten(published(write_gptq, "qwen3_moe"), tmp_path / "biased", with_biases(0.0))
    assert_same_bits(generate(load(biased, "25%"), ONE_PROMPT), references.output(plain_folder, ONE_PROMPT))


def test_other_biases_are_refused(published, load, tmp_path):
    biased = rewritten(published(write_gptq, "qwen3_moe"), tmp_path / "biased", with_biases(0.5))
    with pytest.raises(CorruptCheckpointError, match=r"bias, which the model has no place for"):
        load(biased, "25%")
