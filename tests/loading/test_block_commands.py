"""Every command on a GGUF file whose weights stay in blocks, as they do unless --math torch is given."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.batching.rows import can_be_padded
from foreroute.cli.main import main
from foreroute.config import EngineConfig
from foreroute.loading.block_kernels import dense_nbytes_at_load
from foreroute.loading.checkpoint import open_checkpoint
from foreroute.memory import serving
from foreroute.memory.host import Mapping
from foreroute.model.build.dense_blocks import dense_nbytes, dense_weights
from tests.formats.gguf_writer import Kind, Written, write_gguf

FAST = ("--threads", "1", "--json")
TEXT = "The harbour was quiet, and nobody came. Ships lay at anchor, their lamps out.\n" * 4


@pytest.fixture(scope="module")
def made(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_gguf(tmp_path_factory.mktemp("blocks"), "gpt-oss", Kind.MXFP4, dense=Kind.Q8_0)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def run_command(*args: str | Path, expect: int = 0) -> Any:
        threads = torch.get_num_threads()
        code = main([str(arg) for arg in args])
        torch.set_num_threads(threads)
        out, err = capfd.readouterr()
        assert code == expect, out + err
        return json.loads(out) if out else err

    return run_command


def test_generate_and_plan(made: Written, run: Any) -> None:
    asked = ["--memory", "40%", "--max-new-tokens", "6", "--no-do-sample", *FAST]
    told = run("generate", made.path, "Hello", *asked)
    assert (told["plan"]["math"], told["plan"]["compute_dtype"]) == ("ggml", "float32")
    assert len(told["token_ids"]) == 6
    planned = run("plan", made.path, "--memory", "40%", *FAST)
    assert planned["plan"]["dense_bytes"] == told["plan"]["dense_bytes"]
    assert run("plan", made.path, "--memory", "40%", "--math", "torch", *FAST)["plan"]["math"] == "own"


def test_fit_and_score(made: Written, run: Any, tmp_path: Path) -> None:
    """The token table is fitted to the rows of an embedding that has no weight."""
    text, fitted = tmp_path / "text.txt", tmp_path / "model.fitted"
    text.write_text(TEXT)
    run("fit", made.path, "--text", text, "--context", "32", "--out", fitted, *FAST)
    run("score", made.path, "--text", text, "--context", "32", "--predictor", fitted, *FAST)
    told = run("generate", made.path, "Hello", "--memory", "40%", "--max-new-tokens", "6", "--predictor", fitted, *FAST)
    assert told["plan"]["predictor"] == "fitted"


def test_eval_and_bench(made: Written, run: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    ours = run("eval", made.path, "--text", text, "--context", "64", *FAST)["bits_per_char"]["all"]
    theirs = run("eval", made.path, "--text", text, "--context", "64", "--math", "torch", *FAST)["bits_per_char"]["all"]
    assert ours == pytest.approx(theirs, rel=0.05)
    assert ours != theirs
    dense = run("plan", made.path, *FAST)["plan"]["dense_bytes"]
    told = run("bench", made.path, "--quick", "--rungs", "cache", "-n", "4", "-r", "1", "-p", "8", *FAST)
    assert told["dense_bytes"] == dense


def test_a_store_by_a_codecs_earlier_name_is_blocks_too(made: Written, run: Any, tmp_path: Path) -> None:
    store = tmp_path / "int4.foreroute"
    run("pack", made.path, "--quant", "int4", "--out", store, *FAST)
    asked = ["generate", made.path, "Hello", "--memory", "40%", "--packed", store, "--max-new-tokens", "3", *FAST]
    plan = run(*asked)["plan"]
    assert (plan["math"], plan["compute_dtype"], plan["stored_dtype"]) == ("ggml", "float32", "q4_1")
    assert run(*asked, "--math", "ggml")["plan"]["math"] == "ggml"


def test_a_store_of_the_files_own_blocks(made: Written, run: Any, tmp_path: Path) -> None:
    store = tmp_path / "stored.foreroute"
    run("pack", made.path, "--out", store, *FAST)
    asked = ["generate", made.path, "Hello", "--memory", "40%", "--max-new-tokens", "6", "--no-do-sample", *FAST]
    packed = run(*asked, "--packed", store)
    assert packed["token_ids"] == run(*asked)["token_ids"]
    assert (packed["plan"]["math"], packed["plan"]["source"]) == ("ggml", "packed")


def test_requests_may_share_steps_and_blocks_are_counted_once(
    made: Written, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are dense weights for serve's budget, not memory of the program beside them."""
    model, apart = load(made.path, "40%"), load(made.path, "40%", dtype="float32", math="torch")
    assert can_be_padded(model)
    names = {name for name, _ in dense_weights(model)}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"} <= names
    assert names == {name for name, _ in dense_weights(apart)}
    assert model.foreroute.plan.dense_bytes == dense_nbytes(model) < dense_nbytes(apart) / 3
    checkpoint = open_checkpoint(made.path, None, "no")
    assert dense_nbytes_at_load(EngineConfig(), checkpoint, torch.device("cpu")) == dense_nbytes(model)
    monkeypatch.setattr(serving, "mappings", lambda: [Mapping(range(0), "", 2**30)])
    ours, theirs = (
        serving.serving_needs(one, one.foreroute.plan, one.foreroute.layers, one.foreroute.engine.pool.residency, 64)
        for one in (model, apart)
    )
    assert ours.dense_bytes == dense_nbytes(model)
    assert ours.dense_bytes + ours.working_bytes == theirs.dense_bytes + theirs.working_bytes
