"""The GGUF file holds the checkpoint's own weights, in the bits that were asked for; no half-written file is left."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import make_synthetic

gguf = pytest.importorskip("gguf", reason="only llama.cpp's side of the comparison needs it (extra: bench)")
from benchmarks import to_gguf  # noqa: E402

OPTIONS = "--layers 2 --experts 4 --top-k 2 --hidden 64 --intermediate 32 --heads 4 --kv-heads 2 --head-dim 16"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "synth"
    return make_synthetic.write_checkpoint(
        make_synthetic.parse_args(["--out", str(folder), *OPTIONS.split(), "--vocab", "512"])
    )


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: t.float().numpy() for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def read(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in tensors}


@pytest.mark.parametrize(("experts", "worst"), [(None, 0), ("q8_0", 0.01), ("q4_0", 0.16)])
def test_experts_have_the_bits_asked_for_and_the_rest_its_sixteen(
    checkpoint: Path, tmp_path: Path, experts: str | None, worst: float
) -> None:
    out = tmp_path / "model.gguf"
    to_gguf.convert(checkpoint, out, "bf16", experts)
    stored, weights = read(out), weights_of(checkpoint)
    for expert in range(4):
        kind, got = stored["blk.1.ffn_down_exps.weight"]
        assert kind == (experts or "bf16").upper()
        wanted = weights[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]
        assert np.abs(got[expert] - wanted).max() <= worst * np.abs(wanted).max()
    exact = {
        "token_embd.weight": ("BF16", "model.embed_tokens.weight"),
        "blk.0.attn_q.weight": ("BF16", "model.layers.0.self_attn.q_proj.weight"),
        "blk.0.ffn_gate_inp.weight": ("F32", "model.layers.0.mlp.gate.weight"),
        "blk.0.attn_norm.weight": ("F32", "model.layers.0.input_layernorm.weight"),
    }
    for name, (kind, source) in exact.items():
        assert stored[name][0] == kind
        np.testing.assert_array_equal(stored[name][1], weights[source])


def test_every_weight_of_the_checkpoint_is_named_once() -> None:
    config = {"num_hidden_layers": 3, "num_experts": 5}
    targets = [target for target, _ in to_gguf.parts(config)]
    sources = [name for _, names in to_gguf.parts(config) for name in names]
    shapes = make_synthetic.tensor_shapes(make_synthetic.parse_args(["--out", "x", "--layers", "3", "--experts", "5"]))
    assert sorted(sources) == sorted(name for name, _ in shapes)
    assert len(set(targets)) == len(targets)


def test_rows_that_are_no_whole_blocks_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="32 weights"):
        to_gguf.stored_bytes([4, 48], gguf.GGMLQuantizationType.Q4_0)


def test_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(ValueError, match="mixtral"):
        to_gguf.convert(tmp_path, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_weight_too_large_for_f16_leaves_no_file(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = min(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.experts.1.up_proj.weight"] = torch.full((32, 64), 1e6, dtype=torch.bfloat16)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="--dtype bf16"):
        to_gguf.convert(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
