"""Blocks whose scales are no numbers: the step is refused, and the expert is named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from foreroute.checkpoint.gguf_file import read_gguf
from foreroute.errors import CorruptCheckpointError
from foreroute.kernels.ggml.library import open_library
from foreroute.kernels.ggml.types import has_bad_scale
from tests.formats.gguf_writer import Kind, write_gguf
from tests.kernels.ggml_matrices import types
from tests.kernels.test_ggml_experts import EXPERTS, Layer, _Streamed, layer_of, step
from tests.support.runs import generate

NAN, INFINITE = b"\x00\x7e", b"\x00\x7c"


@pytest.fixture
def damaged() -> Layer:
    """Expert 3's first block has a NaN scale; its slot is the sixth."""
    layer: Layer = layer_of.__wrapped__("Q8_0")
    slot_bytes = len(layer.memory) // (EXPERTS + 2)
    start = layer.slot_of[3] * slot_bytes
    layer.memory[start : start + 2] = NAN
    return layer


def test_a_step_names_the_expert(damaged: Layer) -> None:
    hidden, routed, gates = step(4)
    assert any(3 in row for row in routed)
    with pytest.raises(CorruptCheckpointError, match="expert 3 of MoE layer 0 gives outputs that are no numbers"):
        damaged.compute(hidden, routed, gates)
    with pytest.raises(CorruptCheckpointError, match="expert 3 of MoE layer 0"):
        damaged.kernels.stream(_Streamed(damaged), [*range(EXPERTS)], hidden, torch.tensor(routed), gates)
    others = [[key if key != 3 else -1 for key in row] for row in routed]
    assert damaged.compute(hidden, others, gates).isfinite().all()


def test_inputs_that_are_no_numbers_are_not_the_expert_s_fault(damaged: Layer) -> None:
    hidden, routed, gates = step(4)
    hidden[:] = float("nan")
    assert damaged.compute(hidden, routed, gates).isnan().any()


@pytest.mark.parametrize("scale", [NAN, INFINITE])
def test_a_file_with_such_a_scale(scale: bytes, load: Callable[..., Any], tmp_path: Path) -> None:
    made = write_gguf(tmp_path, "qwen3moe", Kind.Q8_0, dense=Kind.Q8_0)
    index = read_gguf(made.path)
    entry = index.tensors["blk.1.ffn_up_exps.weight"]
    each = entry.nbytes // entry.shape[0]
    with open(made.path, "r+b") as file:
        for expert in range(entry.shape[0]):
            file.seek(entry.offset + expert * each)
            file.write(scale)
    model = load(made.path, "40%")
    with pytest.raises(CorruptCheckpointError, match=r"expert \d of MoE layer 1 gives outputs .* download it again"):
        generate(model)


@pytest.mark.parametrize("name", types())
def test_a_scale_that_is_no_number_is_found(name: str) -> None:
    """Found wherever the numbers that ggml makes of random bytes are none; and nowhere else, but that the largest power
    of two is no number in MXFP4, where ggml has one."""
    kind = open_library().types[name]
    rows = np.random.default_rng(0).integers(0, 256, (3000, kind.nbytes), dtype=np.uint8)
    numbers = np.empty((len(rows), kind.weights), dtype=np.float32)
    open_library().to_float(name)(rows.ctypes.data, numbers.ctypes.data, numbers.size)
    bad = ~np.isfinite(numbers).all(1)
    if name in ("IQ1_M", "NVFP4", "F32"):
        assert not has_bad_scale(kind, rows[~bad])
        return
    bad = rows[:, 0] == 255 if name == "MXFP4" else bad
    assert 0 < bad.sum() < 600
    assert not has_bad_scale(kind, rows[~bad])
    assert all(has_bad_scale(kind, np.concatenate((rows[~bad][:5], one[None]))) for one in rows[bad][:40])


def test_a_dense_matrix_with_such_a_scale_is_refused_at_load(load: Callable[..., Any], tmp_path: Path) -> None:
    made = write_gguf(tmp_path, "qwen3moe", Kind.Q8_0, dense=Kind.Q8_0)
    entry = read_gguf(made.path).tensors["blk.2.attn_k.weight"]
    with open(made.path, "r+b") as file:
        file.seek(entry.offset + 34 * 9)
        file.write(NAN)
    with pytest.raises(CorruptCheckpointError, match=r"blk\.2\.attn_k\.weight has a scale that is no number"):
        load(made.path, "40%")


def test_a_head_passes_on_what_is_no_number(load: Callable[..., Any], tmp_path: Path) -> None:
    """An activation that is none, from anywhere, ends in logits that are none, which decoding refuses."""
    made = write_gguf(tmp_path, "qwen3moe", Kind.Q8_0, dense=Kind.Q8_0)
    model = load(made.path, "40%")
    assert model.lm_head.is_head
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
        assert model(torch.arange(4)[None]).logits.isnan().all()


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    """As the header has them: the type of a tensor with rows of 96 weights is replaced by one of blocks of 256."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_tensor("token_embd.weight", np.zeros((4, 96, 34), dtype=np.uint8), raw_dtype=Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = path.read_bytes()
    at = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 3 * 8
    assert content[at : at + 4] == int(Kind.Q8_0).to_bytes(4, "little")
    path.write_bytes(content[:at] + int(Kind.Q4_K).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(CorruptCheckpointError, match=r"\[4, 96, 32\] in Q4_K, of which a row is blocks of 256"):
        read_gguf(path)
    shutil.rmtree(tmp_path)
