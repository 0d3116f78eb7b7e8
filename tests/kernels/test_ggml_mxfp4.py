"""gpt-oss as it is published, on ggml's kernels: its bytes in blocks of 17, whose numbers are transformers' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from foreroute.checkpoint.quantised_layout import in_blocks
from foreroute.checkpoint.records import PackedStore
from foreroute.cli.main import main
from foreroute.config import EngineConfig
from foreroute.kernels.ggml.library import open_library
from foreroute.loading.block_kernels import dense_nbytes_at_load
from foreroute.loading.checkpoint import open_checkpoint
from foreroute.prepare.pack import pack
from foreroute.transfer.load import apply_copies
from tests.formats.checks import numbers_of
from tests.formats.test_mxfp4 import reference
from tests.support.quantised import write_mxfp4
from tests.support.runs import THREE_PROMPTS, assert_same_bits, expert_table, generate, packed_store


@pytest.fixture(scope="module")
def folder(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mxfp4(checkpoints.get("gpt_oss", "bf16"), tmp_path_factory.mktemp("mxfp4") / "model")


def test_every_byte_and_every_exponent_is_the_same_number_in_ggmls_block() -> None:
    """Spread by the copies of a read, and in the order that the kernels expect of their input: extremes included."""
    nibbles = torch.arange(256, dtype=torch.uint8).view(16, 16)
    blocks = nibbles.expand(1, 255, 16, 16).contiguous()  # 255 exponents; the last is no number in the format
    exponents = torch.arange(255, dtype=torch.uint8).view(1, -1, 1).expand(1, -1, 16).contiguous()
    theirs = reference(blocks, exponents, torch.float32)[0].t().reshape(-1, 32)
    spread = np.empty((len(theirs), 17), dtype=np.uint8)
    spread[:, 0], spread[:, 1:] = exponents.reshape(-1), blocks.reshape(-1, 16)
    ours = np.empty((len(theirs), 32), dtype=np.float32)
    open_library().traits("MXFP4").to_float(spread.ctypes.data, ours.ctypes.data, ours.size)
    in_order = torch.from_numpy(ours).view(-1, 2, 16).transpose(1, 2).reshape(-1, 32)
    assert torch.equal(in_order, theirs)  # but for the sign of zeros, which ggml's integers lack
    assert len(theirs.unique()) > 1000


def test_records_in_blocks_are_transformers_numbers(folder: Path, tmp_path: Path) -> None:
    """Read from the checkpoint, and from a store that holds them so."""
    published, state = expert_table(folder), load_file(folder / "model.safetensors")
    table = in_blocks(published)
    assert table.slot_bytes <= published.slot_bytes + 4096
    path = tmp_path / "store"
    pack(table, path, progress=lambda done, total: None)
    store = PackedStore(path, published)
    assert store.table.layers == table.layers
    for key in (0, 5, table.num_keys - 1):
        layer, expert = table.expert_id(key)
        stem = table.layers[layer].name
        for reads in (table.reads, store.reads_of(table)):
            up, up_bias, down, down_bias = numbers_of(table, key, reads, torch.bfloat16)
            for name, ours in (("gate_up_proj", up), ("down_proj", down)):
                theirs = reference(state[f"{stem}.{name}_blocks"], state[f"{stem}.{name}_scales"], torch.bfloat16)
                assert torch.equal(ours, theirs[expert])
            assert torch.equal(up_bias, state[f"{stem}.gate_up_proj_bias"][expert])
            assert torch.equal(down_bias, state[f"{stem}.down_proj_bias"][expert])
    assert len(store.reads_of(table)(0)) == 1


def test_pack_writes_blocks_which_ggml_and_torch_both_read(
    folder: Path, load: Callable[..., Any], tmp_path: Path
) -> None:
    assert main(["pack", str(folder), "--out", str(tmp_path), "--json"]) == 0
    packed = load(folder, "40%", packed=str(tmp_path))
    assert (packed.foreroute.plan.math, packed.foreroute.plan.source) == ("ggml", "packed")
    assert packed.foreroute.plan.math_note == ""
    assert_same_bits(generate(packed, THREE_PROMPTS), generate(load(folder, "40%"), THREE_PROMPTS))
    by_torch = load(folder, "40%", packed=str(tmp_path), math="torch")
    assert by_torch.foreroute.plan.math == "own"
    assert_same_bits(generate(by_torch, THREE_PROMPTS), generate(load(folder, "40%", math="torch"), THREE_PROMPTS))


def test_a_store_with_blocks_and_exponents_apart_is_read_on(folder: Path, load: Callable[..., Any]) -> None:
    """Torch computes it, and what to do is said."""
    model = load(folder, "40%", packed=str(packed_store(folder)))
    assert model.foreroute.plan.math == "own"
    assert "pack --force" in model.foreroute.plan.math_note


def test_outputs_are_those_of_the_dequantised_experts(folder: Path, load: Callable[..., Any]) -> None:
    """Each layer's output from ggml's kernels is within the rounding of 8-bit activations of torch's."""
    seen: dict[str, list[torch.Tensor]] = {}
    for math in ("torch", "ggml"):
        model = load(folder, "100%", math=math, dtype="float32")
        assert model.foreroute.plan.math == {"torch": "own", "ggml": "ggml"}[math]
        hidden = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
        ids = torch.tensor([[0, 3], [1, 2], [3, 0], [2, 1], [0, 1]])
        weights = torch.tensor([[0.75, 0.25]]).expand(5, 2).contiguous()
        experts = [module for name, module in model.named_modules() if name.endswith("mlp.experts")]
        seen[math] = [module(hidden, ids, weights) for module in experts[:2]]
    for ours, theirs in zip(seen["ggml"], seen["torch"], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02
        assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("memory", ["20%", "50%"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_are_the_same_at_every_budget_and_in_a_batch(
    folder: Path, load: Callable[..., Any], dtype: str, memory: str, tmp_path: Path
) -> None:
    resident = load(folder, "100%", dtype=dtype)
    model = load(folder, memory, dtype=dtype)
    assert model.foreroute.plan.math == "ggml"
    assert_same_bits(generate(model, THREE_PROMPTS), generate(resident, THREE_PROMPTS))
    assert model.foreroute.stats().evictions > 0


def test_copies_put_blocks_beside_their_exponents(folder: Path) -> None:
    table = in_blocks(expert_table(folder))
    part = table.layers[0].layout.parts[0]
    spreads = [one for one in table.layers[0].spreads if one.copy.dst_offset < part.nbytes]
    assert {one.copy.itemsize for one in spreads} == {1, 16}
    slot = bytearray(table.slot_bytes)
    for read in table.reads(3):
        with open(read.path, "rb") as file:
            file.seek(read.offset)
            apply_copies(read.copies, np.frombuffer(file.read(read.nbytes), np.uint8), memoryview(slot))
    state = load_file(folder / "model.safetensors")
    name = table.layers[0].name
    found = np.frombuffer(slot, np.uint8)[: part.nbytes].reshape(-1, 17)
    assert (found[:, 0] == state[f"{name}.gate_up_proj_scales"][3].numpy().reshape(-1)).all()
    assert (found[:, 1:] == state[f"{name}.gate_up_proj_blocks"][3].numpy().reshape(-1, 16)).all()


def test_dense_matrices_stay_in_sixteen_bits(folder: Path, load: Callable[..., Any]) -> None:
    """Multiplied by ggml too, as torch has one thread while a token is decoded; in as much memory as in the file."""
    model = load(folder, "100%")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.matrix.kind.name == model.lm_head.matrix.kind.name == "BF16"
    assert model.foreroute.plan.compute_dtype == "float32"
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(attention.q_proj.matrix.blocks.reshape(-1), stored[name].view(torch.uint8).reshape(-1))
    counted = dense_nbytes_at_load(EngineConfig(), open_checkpoint(folder, None, "no"), torch.device("cpu"))
    assert model.foreroute.plan.dense_bytes == pytest.approx(counted, rel=0.02)
    by_torch = load(folder, "100%", math="torch", dtype="float32")
    assert by_torch.foreroute.plan.dense_bytes > 1.5 * model.foreroute.plan.dense_bytes
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        ours, theirs = model(ids).logits, by_torch(ids).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05
