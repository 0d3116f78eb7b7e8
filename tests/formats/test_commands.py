"""The commands on published formats: plan, pack, pack --quant, verify and fit see what is stored."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.checkpoint.locate import read_index
from foreroute.checkpoint.records import PackedStore
from foreroute.cli.main import EXIT_ERROR, main
from foreroute.kernels.torch import dequantise
from foreroute.kernels.torch.dequantise import decode_fp8
from foreroute.model.build.skeleton import outline
from foreroute.prepare.pack import pack
from tests.cli.harness import Ran
from tests.formats.checks import numbers_of
from tests.support.packs import numbers_again, pack_quantised, quantiser_of, quiet
from tests.support.quantised import rewritten, write_fp8, write_gptq, write_mxfp4

FAST = ("--threads", "1", "--json")
FORMATS = {"mxfp4": (write_mxfp4, "gpt_oss"), "fp8": (write_fp8, "deepseek_v3"), "gptq": (write_gptq, "qwen3_moe")}


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    def run_command(*args: str | Path, expect: int = 0) -> Ran:
        threads = torch.get_num_threads()
        code = main([str(arg) for arg in args])
        torch.set_num_threads(threads)
        ran = Ran(code, *capfd.readouterr())
        assert code == expect, ran.out + ran.err
        return ran

    return run_command


@pytest.mark.parametrize(
    ("name", "asked", "kind"),
    [
        ("mxfp4", "resident", "resident"),
        ("mxfp4", "on-demand", "on-demand"),
        ("fp8", "auto", "resident"),
        ("gptq", "auto", "on-demand"),
    ],
)
def test_verify(published, run, name, asked, kind):
    """Every expert as transformers dequantises it, every dense weight, and every step."""
    write, family = FORMATS[name]
    math = ("--math", "torch") if asked == "resident" else ()  # whose numbers are the resident model's
    answer = run(
        "verify", published(write, family), "--reference", asked, "--tokens", "6", "--memory", "30%", *math, *FAST
    ).json
    assert (answer["same"], answer["reference"], answer["complaints"]) == (True, kind, [])
    assert answer["plan"]["stored_dtype"] == name


def test_verify_finds_a_wrong_number(published, run, monkeypatch):
    """One number of two thousand is another once it is dequantised: said, and that it is an expert's."""

    def wrong(components, out, coding):
        decode_fp8(components, out, coding)
        if out.shape == (64, 32):  # the experts' second matrix
            out[5, 7] += 0.25

    monkeypatch.setitem(dequantise.DECODERS, "fp8", wrong)
    write, family = FORMATS["fp8"]
    ran = run("verify", published(write, family), "--reference", "resident", "--tokens", "4", *FAST, expect=1)
    assert not ran.json["same"]
    assert "expert" in json.dumps(ran.json["first_difference"]), ran.json["first_difference"]


def test_a_resident_reference_that_cannot_be(published, run, capfd):
    write, family = FORMATS["gptq"]
    assert main(["verify", str(published(write, family)), "--reference", "resident", *FAST]) == EXIT_ERROR
    assert "--reference on-demand" in capfd.readouterr().err


def test_plan_counts_stored_bytes(published, run):
    write, family = FORMATS["mxfp4"]
    plan = run("plan", published(write, family), "--memory", "50%", *FAST).json["plan"]
    weights = 64 * 64 + 32 * 64
    assert plan["stored_dtype"] == "mxfp4"
    assert plan["expert_bytes"] == weights * 4.25 / 8 + 2 * (64 + 64)
    assert plan["total_expert_bytes"] == 4 * 12 * plan["expert_bytes"]


def test_dense_bytes_are_those_of_numbers(published, load):
    """What the dense weights will take is known before they are loaded: FP8 ones grow twofold."""
    for name in ("fp8", "gptq", "mxfp4"):
        write, family = FORMATS[name]
        folder = published(write, family)
        expected = load(folder, math="torch").foreroute.plan.dense_bytes
        assert math.isclose(outline(folder, read_index(folder)).dense_nbytes, expected, rel_tol=0.02)


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "gptq"])
def test_pack_quantises_the_numbers_a_second_time(published, load, tmp_path, name):
    """What is quantised are the numbers of the checkpoint, by row, in the family's order."""
    write, family = FORMATS[name]
    folder = published(write, family)
    packed = pack_quantised(folder, "q8_0", tmp_path / "q8_0", 2)
    sketch, quantiser = outline(folder, read_index(folder)), quantiser_of(folder, "q8_0")
    store = PackedStore(packed, sketch.table)
    key = sketch.table.keys.key(1, 3)
    numbers = numbers_of(sketch.table, key, sketch.table.reads, torch.float32)
    made = numbers_of(quantiser.table, key, store.reads_of(quantiser.table), torch.float32)
    for part, before, after in zip(quantiser.table.layers[1].parts, numbers, made, strict=True):
        rows = before if before.ndim == 1 or not part.is_transposed else before.t()
        expected = before if before.ndim == 1 else numbers_again(rows, "Q8_0")
        assert torch.equal(after, expected.t() if part.is_transposed else expected)
    model = load(folder, "25%", packed=str(packed))
    assert model.foreroute.plan.math == "ggml"
    with torch.no_grad():
        assert model(torch.arange(9)[None]).logits.isfinite().all()


def test_pack_says_that_it_is_the_second_time(published, run, capfd, tmp_path):
    write, family = FORMATS["mxfp4"]
    folder = str(published(write, family))
    assert main(["pack", folder, "--quant", "q8_0", "--out", str(tmp_path / "store"), "--threads", "1"]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "quantised already (mxfp4), and --quant q8_0 quantises them a second time" in said
    assert main(["pack", folder, "--out", str(tmp_path / "plain"), "--threads", "1"]) == 0
    assert "second time" not in capfd.readouterr().err


def test_mxfp4_stays_the_same_numbers_in_ggmls_order(published, tmp_path):
    write, family = FORMATS["mxfp4"]
    folder = published(write, family)
    quantiser = quantiser_of(folder, "mxfp4")
    pack(quantiser.source, tmp_path / "store", progress=quiet, quantiser=quantiser)
    assert [error.relative for error in quantiser.errors] == [0.0] * 4


def test_fit_and_generate(published, run, tmp_path):
    write, family = FORMATS["mxfp4"]
    folder, text = published(write, family), tmp_path / "text.txt"
    text.write_text("The ship came into the harbour with nobody on board. " * 60)
    out = tmp_path / "fitted.safetensors"
    run("fit", folder, "--text", text, "--out", out, "--context", "64", *FAST)
    ran = run("generate", folder, "The ship", "--no-chat", "--max-new-tokens", "4", "--predictor", out, *FAST)
    assert ran.json["plan"]["predictor"] == "fitted"


def test_keys_and_values_alone_are_quantised(checkpoints, run, tmp_path, caplog):
    """transformers' resident model is one of numbers then too; pack says what it leaves unread, as generate does."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    folder = rewritten(
        checkpoints.get("qwen3_moe", "bf16"),
        tmp_path / "scaled",
        lambda state: {**state, "model.layers.0.self_attn.k_scale": torch.ones(1)},
        quantization_config={"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme},
    )
    run("pack", folder, "--out", tmp_path / "store")
    assert caplog.text.count("Scales of keys and values are left unread") == 1
    answer = run("verify", folder, "--reference", "resident", "--tokens", "6", "--memory", "30%", *FAST).json
    assert (answer["same"], answer["complaints"]) == (True, [])
