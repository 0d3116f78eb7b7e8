"""`foreroute pack` of GPTQ, AWQ and compressed-tensors: four-bit integers in ggml's blocks that hold them exactly.

The numbers are written a second time, by the formats' definitions (plain.py), and read from the store by the gguf
package.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from foreroute.checkpoint.assembly import Coding
from foreroute.checkpoint.codecs import misfit_for_types
from foreroute.checkpoint.records import STORE_NAME, PackedStore
from foreroute.cli.main import main
from foreroute.config import EngineConfig
from foreroute.errors import UnsupportedModelError
from foreroute.kernels.ggml.layer import GgmlLayer
from foreroute.kernels.ggml.linear import BlockLinear
from foreroute.kernels.torch.int4_blocks import types_that_hold
from foreroute.kernels.torch.layer import TorchLayer
from foreroute.loading.block_kernels import dense_nbytes_at_load
from foreroute.loading.checkpoint import open_checkpoint
from foreroute.prepare.pack import pack
from foreroute.prepare.quantise import Int4Blocks, find_held
from tests.formats.checks import numbers_of
from tests.formats.plain import State, unpacked
from tests.support.packs import pack_exact, pack_quantised, quiet
from tests.support.quantised import (
    rewritten,
    words,
    write_awq,
    write_fp8,
    write_gptq,
    write_gptq_around,
    write_packed_int4,
)
from tests.support.runs import assert_same_bits, expert_table, generate

MIDDLE, FOUR, SEVEN = write_gptq_around(8), write_gptq_around(4), write_gptq_around(7)


def in_groups_of_32(source: Path, folder: Path) -> Path:
    return write_awq(source, folder, 32)


def in_groups_of_24(source: Path, folder: Path) -> Path:
    return write_gptq(source, folder, 24)


CASES = {  # writer, type of every matrix
    "gptq": (MIDDLE, "Q4_0"),
    "gptq, zeros of 4": (FOUR, "Q4_1"),
    "gptq, zeros of 7": (SEVEN, "Q5_0"),
    "awq": (in_groups_of_32, "Q5_0"),
    "pack-quantized": (write_packed_int4, "Q4_0"),
}


@pytest.fixture(scope="module")
def packed(published, tmp_path_factory):
    """Folder and store of a case."""
    root, made = tmp_path_factory.mktemp("exact"), {}

    def get(case: str) -> tuple[Path, Path]:
        if case not in made:
            folder = published(CASES[case][0], "qwen3_moe")
            path = root / f"{folder.name}.foreroute"
            held = pack_exact(folder, path)
            assert not held.note
            assert {kind for types in held.types.values() for kind in types.values()} == {CASES[case][1]}
            made[case] = folder, path
        return made[case]

    return get


def products(state: State, stem: str) -> torch.Tensor:
    """scale * (step - zero) in float32, which holds every such product: [rows, columns]."""
    if f"{stem}weight_packed" in state:
        steps, scales = unpacked(state[f"{stem}weight_packed"]) - 8, state[f"{stem}weight_scale"]
        return (steps.view(*scales.shape, -1) * scales.float()[..., None]).flatten(1)
    scales = state[f"{stem}scales"].float()
    if f"{stem}g_idx" in state:
        steps, zeros = unpacked(state[f"{stem}qweight"].t().contiguous()).t(), unpacked(state[f"{stem}qzeros"]) + 1
    else:
        order = [0, 4, 1, 5, 2, 6, 3, 7]
        steps, zeros = (
            unpacked(state[f"{stem}{which}"]).view(-1, scales.shape[1] // 8, 8)[:, :, order].flatten(1)
            for which in ("qweight", "qzeros")
        )
    groups = torch.arange(len(steps)) // 32
    return ((steps - zeros[groups]) * scales[groups]).t()


@pytest.mark.parametrize("case", CASES)
def test_blocks_hold_the_published_numbers(packed, case):
    """In float32, bit for bit; every expert, read from the store by the gguf package."""
    folder, path = packed(case)
    state, store = load_file(folder / "model.safetensors"), PackedStore(path, expert_table(folder))
    reads, raw = store.reads_of(store.table), path.read_bytes()
    for key in store.table.keys.all():
        (read,) = reads(key)
        layer, expert = store.table.expert_id(key)
        described = store.table.layers[layer]
        parts = iter(described.layout.parts)
        for name in ("gate_proj", "up_proj", "down_proj"):
            part = next(parts)
            start = read.offset + part.offset
            blocks = np.frombuffer(raw[start : start + part.nbytes], np.uint8).reshape(part.shape)
            ours = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[CASES[case][1]])
            theirs = products(state, f"{described.name}.{expert}.{name}.")
            assert np.array_equal(ours, theirs.numpy()), (key, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_torch_has_the_same_bits_from_either(packed, case, dtype):
    """torch's numbers are rounded to the scales' dtype first, as the format's own: from blocks too."""
    folder, path = packed(case)
    table = expert_table(folder)
    store = PackedStore(path, table)
    for key in (0, table.num_experts + 3):
        ours = numbers_of(store.table, key, store.reads_of(store.table), dtype)
        theirs = numbers_of(table, key, table.reads, dtype)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_torch_s_tokens_are_those_of_the_checkpoint(packed, load):
    folder, path = packed("awq")
    ours, theirs = (generate(load(folder, "25%", math="torch", packed=packed)) for packed in (str(path), "no"))
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_ggml_multiplies_them(packed, load, case):
    """Every budget has the same bits, and they are near those of torch's math in float32: the same likeliest tokens."""
    folder, path = packed(case)
    part, whole = load(folder, "25%", packed=str(path)), load(folder, "100%", packed=str(path))
    assert (part.foreroute.plan.math, part.foreroute.plan.source) == ("ggml", "packed")
    assert_same_bits(generate(part), generate(whole))
    assert part.foreroute.stats().evictions > 0
    torch_model = load(folder, "100%", packed="no", math="torch", dtype=torch.float32)
    ids = torch.randint(5, 240, (1, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, theirs = whole(ids).logits[0], torch_model(ids).logits[0]
    # A near tie, of tokens or of a router's experts, may fall otherwise.
    assert int((ours.argmax(-1) != theirs.argmax(-1)).sum()) <= 4
    assert float((ours - theirs).abs().median()) < 0.05 * float(theirs.std())


def dense_matrices(model: Any) -> dict[str, tuple[str, torch.Tensor]]:
    """Type and numbers of the linear layers in blocks, by name."""
    return {
        name: (kind.name, torch.from_numpy(gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind.name])))
        for name, module in model.named_modules()
        if isinstance(module, BlockLinear)
        for kind, raw in [(module.matrix.kind, module.matrix.blocks)]
    }


@pytest.mark.parametrize("case", CASES)
def test_dense_matrices_are_held_too(packed, load, case):
    """Not as float32, which would take seven times as much memory; they are the published numbers."""
    folder, path = packed(case)
    model = load(folder, "50%", packed=str(path))
    state, found = load_file(folder / "model.safetensors"), dense_matrices(model)
    quantised = [name for name in found if name != "lm_head"]
    assert len(quantised) == 4 * len(model.model.layers)
    for name in quantised:
        kind, numbers = found[name]
        assert kind == CASES[case][1]
        assert torch.equal(numbers, products(state, f"{name}."))
    assert found["lm_head"][0] == "BF16"
    checkpoint = open_checkpoint(folder, None, str(path))
    counted = dense_nbytes_at_load(EngineConfig(), checkpoint, torch.device("cpu"))
    # Scales in bfloat16 may be none of float16's: until they are read, 16 bits are counted.
    least = 0.6 if case == "pack-quantized" else 0.9
    assert least * counted < model.foreroute.plan.dense_bytes <= counted


def test_dense_fp8_beside_blocks_is_in_16_bits(published, load, tmp_path):
    """As torch's math has it; its experts quantised by `pack --quant`."""
    folder = shutil.copytree(published(write_fp8, "qwen3_moe"), tmp_path / "fp8")
    pack_quantised(folder, "q8_0")
    model = load(folder, "50%", packed="q8_0")
    usual = load(folder, "50%", packed="no")
    found = dense_matrices(model)
    assert len(found) == 4 * len(model.model.layers) + 1
    for name, (kind, numbers) in found.items():
        assert kind == "BF16"
        assert torch.equal(numbers, usual.get_submodule(name).weight.float())


BY_PACK = (
    "Quantised weights are dequantised by torch at each use, much slower than ggml's kernels: it has no products of "
)


@pytest.mark.parametrize("name", ["fp8", "gptq", "awq", "pack-quantized", "gptq in groups of 24"])
def test_a_note_names_the_command_that_makes_it_fast(published, load, tmp_path, name, capsys):
    """At load and in `plan`; of four-bit integers the lossless one first. Following it ends the note."""
    writers = {
        "fp8": write_fp8, "gptq": MIDDLE, "awq": in_groups_of_32, "pack-quantized": write_packed_int4,
        "gptq in groups of 24": in_groups_of_24,
    }  # fmt: skip
    folder = shutil.copytree(published(writers[name], "qwen3_moe"), tmp_path / "model")
    note = load(folder, "50%").foreroute.plan.math_note
    exactly = f"`foreroute pack {folder}` writes what its blocks hold exactly in these; "
    quantise = f"`foreroute pack {folder} --quant q8_0` rounds them to blocks, for --packed q8_0."
    is_held = name in ("gptq", "awq", "pack-quantized")
    assert note == f"{BY_PACK}{name.split()[0]}; {exactly if is_held else ''}{quantise}"
    assert load(folder, "50%", math="torch").foreroute.plan.math_note == ""
    assert main(["plan", str(folder), "--threads", "1"]) == 0
    assert "it has no products of" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UnsupportedModelError, match=f'math="ggml": it has no products of {name.split()[0]}'):
        load(folder, "50%", math="ggml")
    assert main(["pack", str(folder), *([] if is_held else ["--quant", "q8_0"])]) == 0
    model = load(folder, "50%", packed="auto" if is_held else "q8_0")
    assert (model.foreroute.plan.math, model.foreroute.plan.math_note) == ("ggml", "")


def test_a_store_of_an_earlier_version_is_packed_again(published, load, tmp_path):
    """It has the published form."""
    folder = shutil.copytree(published(MIDDLE, "qwen3_moe"), tmp_path / "model")
    pack(expert_table(folder), folder / STORE_NAME, progress=quiet)
    model = load(folder, "50%")
    assert (model.foreroute.plan.math, model.foreroute.plan.source) == ("own", "packed")
    assert f"`foreroute pack {folder} --force` writes" in model.foreroute.plan.math_note
    assert main(["pack", str(folder), "--force"]) == 0
    assert load(folder, "50%").foreroute.plan.math == "ggml"


@pytest.mark.parametrize(
    ("scale", "zero", "types"),
    [
        (0.0123, 8, ("Q4_0", "Q4_1", "Q5_0")),
        (0.0123, 4, ("Q4_1", "Q5_0")),
        (0.0123, 7, ("Q5_0",)),
        (0.5, 7, ("Q4_1", "Q5_0")),
        (6e4, 2, ("Q5_0",)),
        (2.0**-24, 8, ("Q4_0", "Q4_1", "Q5_0")),
        (2.0**-25, 8, ()),
        (7e4, 8, ()),
        (float("inf"), 8, ()),
        (float("nan"), 8, ()),
        (1 + 2.0**-11, 8, ()),
    ],
)
def test_which_types_hold_what(scale, zero, types):
    """One scale of several decides; float16 has 11 bits, and its range."""
    dtype = torch.float32 if torch.tensor(scale).half().float() != scale and not 0.01 < scale < 0.02 else torch.float16
    scales = torch.full((2, 8), 0.25, dtype=dtype)
    scales[1, 5] = scale
    zeros = torch.full((2, 8), 8)
    zeros[1, 5] = zero
    coding = Coding("gptq-int4", (1, 32))
    assert types_that_hold(coding, scales, words(zeros)) == types


def one_other_scale(state: State) -> State:
    """The scales as float32, of which one expert's in layer 1 has one that float16 does not hold."""
    changed = {name: one.float() if name.endswith("weight_scale") else one for name, one in state.items()}
    changed["model.layers.1.mlp.experts.2.up_proj.weight_scale"][3, 0] *= 1 + 2.0**-20
    return changed


def test_a_layer_with_a_scale_that_float16_does_not_hold(published, load, tmp_path, capsys):
    """That layer stays as published, and torch computes it; the others are blocks. One line says so."""
    folder = rewritten(published(write_packed_int4, "qwen3_moe"), tmp_path / "other", one_other_scale)
    assert main(["pack", str(folder)]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "1 of 3 MoE layers stay as published" in told
    assert "1 with scales that are no float16. --quant q8_0 or q4_k" in told
    model = load(folder, "25%")
    layers = model.foreroute.table.layers
    codings = [{one.coding.block_type for part in layer.parts for one in part.matrices} for layer in layers]
    assert codings == [{"Q4_0"}, {""}, {"Q4_0"}]
    assert [type(one) for one in model.foreroute.host_engine.kernels] == [GgmlLayer, TorchLayer, GgmlLayer]
    assert_same_bits(generate(model), generate(load(folder, "100%")))
    ours = load(folder, "25%", math="torch")
    assert_same_bits(generate(ours), generate(load(folder, "25%", math="torch", packed="no")))


def test_columns_in_another_order(published, checkpoints, tmp_path):
    def change(state: State) -> State:
        changed = dict(state)
        for name in [name for name in state if name.endswith("g_idx")]:
            changed[name] = state[name].flip(0).contiguous()
        return changed

    folder = rewritten(published(MIDDLE, "qwen3_moe"), tmp_path / "ordered", change)
    held = find_held(expert_table(folder), quiet)
    assert not held.types
    assert "3 of 3 MoE layers stay as published" in held.note
    assert "3 with columns in another order (g_idx)" in held.note


@pytest.mark.parametrize(
    ("block", "cols", "why"),
    [
        ((1, 32), 64, ""),
        ((1, 0), 64, ""),
        ((1, 1024), 64, ""),
        ((1, 24), 64, "groups of 24 weights, which are no whole blocks of 32"),
        ((1, 16), 64, "groups of 16 weights, which are no whole blocks of 32"),
        ((1, 0), 48, "rows of 48 weights, which are no whole blocks of 32"),
        ((1, 32), 80, "rows of 80 weights, which are no whole blocks of 32"),
    ],
)
def test_groups_that_are_no_whole_blocks(published, block, cols, why):
    layer = expert_table(published(MIDDLE, "qwen3_moe")).layers[0]
    parts = tuple(
        replace(
            part,
            matrices=tuple(replace(one, coding=replace(one.coding, block=block), cols=cols) for one in part.matrices),
        )
        for part in layer.parts
    )
    assert misfit_for_types(replace(layer, parts=parts)) == why


def test_groups_of_24_stay_as_published(checkpoints, load, tmp_path, capsys):
    folder = write_gptq(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "ragged", 24)
    assert main(["pack", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "plain"
    model = load(folder, "25%")
    assert (model.foreroute.plan.math, model.foreroute.plan.source) == ("own", "packed")


def test_a_group_that_is_the_whole_row_and_a_last_one_that_is_shorter(checkpoints, tmp_path):
    """GPTQ's groups of 48 columns are no whole blocks; those of 64 and -1 are, also where a row has 32 columns."""
    source = checkpoints.get("qwen3_moe", "bf16")
    for group, is_held in ((48, False), (64, True), (0, True)):
        folder = write_gptq(source, tmp_path / f"group-{group}", group)
        if not group:
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"]["group_size"] = -1
            (folder / "config.json").write_text(json.dumps(config))
        assert bool(find_held(expert_table(folder), quiet).types) == is_held


def test_the_command_writes_blocks_that_are_used_by_themselves(published, load, tmp_path, capsys):
    folder = shutil.copytree(published(MIDDLE, "qwen3_moe"), tmp_path / "model")
    assert main(["pack", str(folder), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["codec"] == "stored"
    model = load(folder, "25%")
    assert (model.foreroute.plan.math, model.foreroute.plan.source) == ("ggml", "packed")
    assert_same_bits(generate(model), generate(load(folder, "100%")))
    assert main(["pack", str(folder)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    plain_rows = generate(load(folder, "25%", math="torch"))
    assert_same_bits(plain_rows, generate(load(folder, "25%", math="torch", packed="no")))


def test_several_threads_write_the_same_store(published, tmp_path):
    table = expert_table(published(in_groups_of_32, "qwen3_moe"))
    held = find_held(table, quiet)
    made = []
    for threads in (1, 3):
        path = tmp_path / f"{threads}.foreroute"
        pack(table, path, progress=quiet, quantiser=Int4Blocks(table, held.types, threads))
        made.append(path.read_bytes())
    assert made[0] == made[1]


def test_unquantised_experts_have_nothing_to_hold(checkpoints):
    held = find_held(expert_table(checkpoints.get("qwen3_moe", "bf16")), quiet)
    assert (held.types, held.note) == ({}, "")
