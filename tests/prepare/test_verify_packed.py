"""`foreroute verify` of stores in blocks that `pack` made: of four-bit integers, and by --quant."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.cli.main import main
from foreroute.prepare.quantise import Int4Blocks, Quantiser
from foreroute.verification.distance import MOST_KL
from tests.support.quantised import write_fp8, write_gptq_around, write_mxfp4

# The expert whose record is another than the checkpoint's.
LAYER, EXPERT = 1, 5


@pytest.fixture(scope="module")
def folders(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By --quant, "" for none: a checkpoint in floats, one in GPTQ."""
    plain, root = checkpoints.get("qwen3_moe", "bf16"), tmp_path_factory.mktemp("verified")
    return {"": write_gptq_around(8)(plain, root / "gptq"), "q8_0": Path(plain)}


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process: its output, once it has ended with this code."""

    def run_command(*args: str | Path, expect: int = 0) -> str:
        threads = torch.get_num_threads()
        code = main([str(arg) for arg in args])
        torch.set_num_threads(threads)
        out, err = capfd.readouterr()
        assert code == expect, out + err
        return out

    return run_command


@pytest.fixture
def packed(run: Any, folders: dict[str, Path], tmp_path: Path) -> Any:
    """Pack a copy of the checkpoint of a --quant: its folder."""

    def packing(quant: str) -> Path:
        folder = shutil.copytree(folders[quant], tmp_path / "model")
        run("pack", folder, *(["--quant", quant] if quant else []))
        return folder

    return packing


@pytest.fixture
def verified(run: Any, tmp_path: Path) -> Any:
    """Run `verify --json` on a folder, of a store by --quant: the answer."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The ship came into the harbour.\n1 + 1 =\n")

    def verifying(folder: Path, quant: str, *flags: str, expect: int) -> Any:
        asked = ["--packed", quant] if quant else []
        short = ["--tokens", "8", "--threads", "1", "--json"]
        return json.loads(run("verify", folder, *asked, "--prompts", prompts, *short, *flags, expect=expect))

    return verifying


@pytest.mark.parametrize("quant", ["", "q8_0"])
def test_the_same_bits_and_records(packed: Any, verified: Any, quant: str) -> None:
    folder = packed(quant)
    for kind in ("resident", "on-demand"):
        answer = verified(folder, quant, "--reference", kind, expect=0)
        assert (answer["same"], answer["reference"]) == (True, kind)
        assert (answer["plan"]["math"], answer["plan"]["source"]) == ("ggml", "packed")
        assert answer["evictions"] > 0
        assert 0 < answer["beside_torch"]["median_kl"] < MOST_KL


@pytest.mark.parametrize(("quant", "encoder"), [("", Int4Blocks), ("q8_0", Quantiser)])
def test_a_record_of_other_numbers_is_named(
    packed: Any, verified: Any, quant: str, encoder: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written so by `pack`, with a checksum that is right: only the checkpoint can tell."""
    encode = encoder.encode

    def other(self: Any, key: int, slot: memoryview) -> memoryview:
        record: memoryview = encode(self, key, slot)
        if self.source.expert_id(key) == (LAYER, EXPERT):
            record[40] ^= 1
        return record

    with monkeypatch.context() as patched:
        patched.setattr(encoder, "encode", other)
        folder = packed(quant)
    first = verified(folder, quant, expect=1)["first_difference"]
    assert (first["part"], first["moe_layer"], first["experts"]) == ("experts", LAYER, [EXPERT])
    assert "its slot holds other bytes than the checkpoint" in first["reasons"][0]


@pytest.mark.parametrize(
    ("write", "family", "math"), [(write_mxfp4, "gpt_oss", "ggml"), (write_fp8, "qwen3_moe", "own")]
)
def test_quantised_dense_weights_beside_experts_of_the_checkpoint(
    run: Any, verified: Any, checkpoints: Any, tmp_path: Path, write: Any, family: str, math: str
) -> None:
    """MXFP4's blocks, with rows side by side where this machine has that, and FP8, which torch computes."""
    folder = write(checkpoints.get(family, "bf16"), tmp_path / "model")
    run("pack", folder, "--dense", "q8_0")
    answer = verified(folder, "dense-q8_0", expect=0)
    plan = answer["plan"]
    assert (answer["same"], plan["math"], plan["dense"], plan["source"]) == (True, math, "q8_0", "packed")
    assert 0 < answer["beside_torch"]["median_kl"] < MOST_KL
