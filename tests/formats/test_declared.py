"""What is declared of a quantisation and cannot be is one error that names file and key; and where it may stand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foreroute.checkpoint.locate import read_index
from foreroute.errors import CheckpointError
from foreroute.model.build.skeleton import outline
from tests.support.checkpoints import edit_json
from tests.support.quantised import compressed, write_awq, write_gptq
from tests.support.runs import ONE_PROMPT, assert_same_bits, generate

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
PACKED = compressed("pack-quantized", INT4)
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}

# What is declared -> the key that the message must name.
NONSENSE: dict[str, tuple[Any, str]] = {
    "a list": ([], "quantization_config"),
    "a filled list": ([GPTQ], "quantization_config"),
    "a text": ("gptq", "quantization_config"),
    "a number": (4, "quantization_config"),
    "method of a list": ({**GPTQ, "quant_method": ["gptq"]}, "quant_method"),
    "method of a number": ({**GPTQ, "quant_method": 4}, "quant_method"),
    **{f"gptq bits {value!r}": ({**GPTQ, "bits": value}, "bits") for value in ("4", 4.0, None, [4], True, 0, -4)},
    **{
        f"{of['quant_method']} group_size {value!r}": ({**of, "group_size": value}, "group_size")
        for of in (GPTQ, AWQ)
        for value in ("128", 0, -2, None, [128], 12.5, False)
    },
    "gptq desc_act": ({**GPTQ, "desc_act": "false"}, "desc_act"),
    "gptq checkpoint_format": ({**GPTQ, "checkpoint_format": 2}, "checkpoint_format"),
    "gptq meta": ({**GPTQ, "meta": "gptqmodel"}, "meta"),
    "awq bits": ({**AWQ, "bits": "4"}, "bits"),
    "awq zero_point": ({**AWQ, "zero_point": "true"}, "zero_point"),
    "awq version": ({**AWQ, "version": ["gemm"]}, "version"),
    **{
        f"fp8 block {value!r}": ({**FP8, "weight_block_size": value}, "weight_block_size")
        for value in (128, "128", [128], [128, 128, 128], ["128", "128"], [0, 128], [128, -1], {"0": 128}, [True, True])
    },
    "fp8 fmt": ({**FP8, "fmt": 4}, "fmt"),
    "fp8 activation_scheme": ({**FP8, "activation_scheme": {}}, "activation_scheme"),
    "groups of a list": ({**PACKED, "config_groups": [INT4]}, "config_groups"),
    "group of a text": ({**PACKED, "config_groups": {"group_0": "int4"}}, "config_groups.group_0"),
    "weights of a list": ({**PACKED, "config_groups": {"group_0": {"weights": [4]}}}, "config_groups.group_0.weights"),
    "format of a list": ({**PACKED, "format": ["pack-quantized"]}, "format"),
    "status of a number": ({**PACKED, "quantization_status": 1}, "quantization_status"),
    "sparsity of a text": ({**PACKED, "sparsity_config": "dense"}, "sparsity_config"),
    "num_bits": (compressed("pack-quantized", {**INT4, "num_bits": "4"}), "weights.num_bits"),
    "group_size": (compressed("pack-quantized", {**INT4, "group_size": 0}), "weights.group_size"),
    "symmetric": (compressed("pack-quantized", {**INT4, "symmetric": "yes"}), "weights.symmetric"),
    "block_structure": (
        compressed("float-quantized", {**FLOAT8, "block_structure": "16x16"}),
        "weights.block_structure",
    ),
}


@pytest.fixture
def declaring(checkpoints: Any, tmp_path: Path) -> Callable[[Any], Path]:
    def made(declared: Any) -> Path:
        folder = shutil.copytree(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "declared")
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "quantization_config": declared}))
        return folder

    return made


@pytest.mark.parametrize("case", NONSENSE)
def test_one_error_that_names_file_and_key(declaring, case):
    declared, key = NONSENSE[case]
    folder = declaring(declared)
    with pytest.raises(CheckpointError) as raised:
        outline(folder, read_index(folder))
    message = str(raised.value)
    assert str(folder / "config.json") in message
    assert f"{key} is " in message
    assert "which makes no sense" in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "[]", "4", '"gptq"', "{", "null", "\udcff"])
def test_a_file_of_the_quantisers_that_is_none(published, tmp_path, text):
    folder = moved(published(write_gptq, "qwen3_moe"), tmp_path / "own", "quantize_config.json")
    (folder / "quantize_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"quantize_config.json is not (a )?JSON"):
        outline(folder, read_index(folder))


def moved(folder: Path, to: Path, name: str, **renamed: str) -> Path:
    """The checkpoint with its declaration in a file of its own, as older quantisers wrote it."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    declared = config.pop("quantization_config")
    declared.pop("quant_method")
    (to / name).write_text(json.dumps({renamed.get(key, key): value for key, value in declared.items()}))
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    ("write", "name", "renamed"),
    [
        (write_gptq, "quantize_config.json", {}),
        (write_awq, "quant_config.json", {"bits": "w_bit", "group_size": "q_group_size"}),
    ],
)
def test_declared_by_the_quantisers_file_alone(published, load, tmp_path, write, name, renamed):
    original = published(write, "qwen3_moe")
    folder = moved(original, tmp_path / "own", name, **renamed)
    model = load(folder, "25%")
    assert_same_bits(generate(model, ONE_PROMPT), generate(load(original, "25%"), ONE_PROMPT))
    assert model.foreroute.plan.stored_dtype in ("gptq", "awq")


def test_the_quantisers_file_completes_config_json(published, tmp_path):
    """An older config.json leaves out what decides how zero points are stored, and rules for single modules."""
    folder = shutil.copytree(published(write_gptq, "qwen3_moe"), tmp_path / "both")
    own = {"bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2", "dynamic": {"+:.*q_proj": {"bits": 8}}}
    (folder / "quantize_config.json").write_text(json.dumps(own))
    with pytest.raises(CheckpointError, match="q_proj is gptq with 8 bits"):
        outline(folder, read_index(folder))
    (folder / "quantize_config.json").write_text(json.dumps({**own, "dynamic": None}))
    form = outline(folder, read_index(folder)).form
    assert form is not None
    assert not form.coding.is_zero_shifted


def test_two_files_that_contradict_each_other(published, tmp_path):
    folder = shutil.copytree(published(write_gptq, "qwen3_moe"), tmp_path / "both")
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    with pytest.raises(CheckpointError, match=r"group_size is 16, but quantize_config.json says 32"):
        outline(folder, read_index(folder))


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_a_file_of_that_name_beside_plain_weights_means_nothing(checkpoints, tmp_path, name):
    folder = shutil.copytree(checkpoints.get("qwen3_moe", "bf16"), tmp_path / "plain")
    (folder / name).write_text(json.dumps({"bits": 3}))
    assert outline(folder, read_index(folder)).form is None


def test_nothing_is_declared_by_null_or_an_empty_object(declaring):
    folder = declaring(None)
    assert outline(folder, read_index(folder)).form is None
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": {}}))
    assert outline(folder, read_index(folder)).form is None
    edit_json(folder / "config.json", quantization_config=None)
