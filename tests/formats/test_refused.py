"""Formats that are not read are refused by name before any work, with what would do instead."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import foreroute
from foreroute.errors import CheckpointError, CorruptCheckpointError, UnsupportedModelError
from tests.support.quantised import (
    compressed,
    rewritten,
    write_awq,
    write_fp8,
    write_gptq,
    write_mxfp4,
    write_packed_int4,
)

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}

# What config.json declares -> what the message must name.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        method: ({"quant_method": method}, method)
        for method in (
            "bitsandbytes", "hqq", "quanto", "eetq", "aqlm", "torchao", "fbgemm_fp8", "bitnet", "vptq",
            "auto-round", "higgs", "quark", "modelopt", "fp_quant", "spqr", "compressed_never_heard_of",
        )
    },
    "no method": ({"load_in_4bit": True}, "without a method"),
    "fp8 per tensor": ({"quant_method": "fp8", "weight_block_size": None}, "one scale per tensor"),
    "fp8 e5m2": ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}, "e5m2"),
    "gptq 3 bits": ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "3 bits"),
    "gptq 8 bits": ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "8 bits"),
    "gptq 2 bits": ({"quant_method": "gptq", "bits": 2, "group_size": 128}, "2 bits"),
    "gptq marlin of old": ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "format marlin"),
    "gptq words of 64": ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int64"}, "pack_dtype int64"),
    "gptq with an adapter": ({"quant_method": "gptq", "bits": 4, "adapter": {"name": "lora"}}, "adapter"),
    "gptq rotated": ({"quant_method": "gptq", "bits": 4, "meta": {"rotation": "hadamard"}}, "rotation"),
    "gptq rule": (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*q_proj": {"method": "qqq"}}},
        "dynamic.+:.*q_proj sets method",
    ),
    "awq gemv of later": ({"quant_method": "awq", "bits": 4, "checkpoint_format": "gemv"}, "checkpoint_format gemv"),
    "awq exllama": ({"quant_method": "awq", "bits": 4, "version": "exllama"}, "version exllama"),
    "awq of llm-awq": ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "backend llm-awq"),
    "awq no zero points": ({"quant_method": "awq", "bits": 4, "zero_point": False}, "no zero points"),
    "several kinds": (
        {
            **compressed("pack-quantized", INT4),
            "config_groups": {"a": {"weights": INT4}, "b": {"weights": {"num_bits": 8, "type": "float"}}},
        },
        "2 kinds of weights",
    ),
    "sparse": (
        {**compressed("pack-quantized", INT4), "sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparse-24-bitmask",
    ),
    "awq gemv": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version gemv"),
    "awq 8 bits": ({"quant_method": "awq", "bits": 8, "group_size": 128}, "8 bits"),
    "int4 zero points": (compressed("pack-quantized", {**INT4, "symmetric": False}), "zero points"),
    "int4 reordered": (compressed("pack-quantized", {**INT4, "actorder": "group"}), "actorder"),
    "int4 rotated": (
        {**compressed("pack-quantized", INT4), "transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
        "transform_config",
    ),
    "gptq marlin": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "format": "marlin"}, "format marlin"),
    "int8 packed": (compressed("pack-quantized", {**INT4, "num_bits": 8}), "8-bit int"),
    "nvfp4": (compressed("nvfp4-pack-quantized", {**INT4, "type": "float"}), "nvfp4-pack-quantized"),
}  # fmt: skip


@pytest.fixture
def declaring(checkpoints, tmp_path):
    def made(declared: dict[str, Any], key: str = "quantization_config") -> Path:
        folder = shutil.copytree(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "declared")
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, key: declared}))
        return folder

    return made


@pytest.fixture
def nothing_read(monkeypatch, published):
    """No weight is read and no model is made, from now on."""
    for write in (write_fp8, write_gptq, write_awq, write_packed_int4):
        published(write, "qwen3_moe")
    from transformers import AutoModelForCausalLM, PreTrainedModel

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work began before the refusal")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", never)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", never)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_before_any_work(declaring, nothing_read, case):
    declared, named = REFUSED[case]
    with pytest.raises(UnsupportedModelError) as refused:
        foreroute.load(declaring(declared), "25%")
    message = str(refused.value)
    assert named in message
    assert "bf16" in message
    assert "docs/formats.md" in message


def test_a_declaration_without_sense(declaring, nothing_read):
    with pytest.raises(CheckpointError, match="makes no sense"):
        foreroute.load(declaring({"quant_method": "fp8", "weight_block_size": 128}), "25%")


def test_older_name_of_the_declaration(declaring, nothing_read):
    with pytest.raises(UnsupportedModelError, match="zero points"):
        foreroute.load(declaring(REFUSED["int4 zero points"][0], "compression_config"), "25%")


def refused_change(published, tmp_path, write, family, change, error, match):
    folder = rewritten(published(write, family), tmp_path / "changed", change)
    with pytest.raises(error, match=match):
        foreroute.load(folder, "25%")


def test_a_scale_that_is_absent(published, tmp_path, nothing_read):
    def without(state):
        return {name: one for name, one in state.items() if not name.endswith("1.mlp.experts.3.up_proj.qzeros")}

    refused_change(published, tmp_path, write_gptq, "qwen3_moe", without, CheckpointError, "experts.3.up_proj.qzeros")


def test_scales_of_another_shape(published, tmp_path):
    def halved(state):
        return {name: one[:, ::2].contiguous() if "_scales" in name else one for name, one in state.items()}

    refused_change(published, tmp_path, write_mxfp4, "gpt_oss", halved, CorruptCheckpointError, "do not fit each other")


@pytest.mark.parametrize("write", [write_fp8, write_gptq, write_awq, write_packed_int4])
def test_scales_of_a_dense_matrix_of_another_shape(published, tmp_path, nothing_read, write):
    """Refused where pack sees it too, not when the dense weights are loaded."""

    def halved(state):
        return {
            name: one[: len(one) // 2].contiguous() if "1.self_attn.q_proj" in name and "scale" in name else one
            for name, one in state.items()
        }

    refused_change(published, tmp_path, write, "qwen3_moe", halved, CorruptCheckpointError, "do not fit each other")


def test_a_dense_matrix_without_its_scales(published, tmp_path, nothing_read):
    """transformers would take the eight-bit numbers for the weights themselves."""

    def without(state):
        return {name: one for name, one in state.items() if not name.endswith("1.self_attn.q_proj.weight_scale_inv")}

    match = r"1.self_attn.q_proj.weight is stored as F8_E4M3 and has no weight_scale_inv"
    refused_change(published, tmp_path, write_fp8, "qwen3_moe", without, CorruptCheckpointError, match)


def test_scales_of_another_dtype(published, tmp_path, nothing_read):
    def as_bytes(state):
        return {name: one.to(torch.uint8) if "scale_inv" in name else one for name, one in state.items()}

    refused_change(published, tmp_path, write_fp8, "qwen3_moe", as_bytes, UnsupportedModelError, "stored as U8")


@pytest.mark.parametrize(
    ("write", "group", "error", "said"),
    [
        # 64 columns or fewer: AWQ wants whole groups, GPTQ a group of whole words.
        (
            write_awq,
            1024,
            CorruptCheckpointError,
            r"qweight: config.json's group_size 1024 does not do for its \d+ col",
        ),
        (write_awq, 24, CorruptCheckpointError, "group_size 24 does not do"),
        (write_gptq, 24, CorruptCheckpointError, "do not fit each other"),
        (write_gptq, 20, CorruptCheckpointError, "group_size 20 does not do"),
        (write_gptq, 4, CorruptCheckpointError, "group_size 4 does not do"),
        (write_gptq, 32, CorruptCheckpointError, "do not fit each other"),
        (write_packed_int4, 1024, CorruptCheckpointError, "group_size 1024 does not do"),
        (write_gptq, 0, CheckpointError, "makes no sense"),
        (write_awq, -2, CheckpointError, "makes no sense"),
    ],
)
def test_groups_that_the_columns_do_not_have(published, tmp_path, write, group, error, said):
    def without_order(state):
        return {name: one for name, one in state.items() if not name.endswith("g_idx")}

    folder = rewritten(published(write, "qwen3_moe"), tmp_path / "changed", without_order)
    config = json.loads((folder / "config.json").read_text())
    declared = config["quantization_config"]
    holder = declared["config_groups"]["group_0"]["weights"] if "config_groups" in declared else declared
    holder["group_size"] = group
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=said):
        foreroute.load(folder, "25%")
