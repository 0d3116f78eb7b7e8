"""Commands on a GGUF file do what they do on safetensors; what they write lies beside it, and is bound to it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

pytest.importorskip("fastapi", reason="needs fastapi: pip install foreroute[serve]")

from starlette.testclient import TestClient

from foreroute.batching.engine import BatchEngine
from foreroute.bench import bandwidth, session
from foreroute.bench.bandwidth import measure_bandwidth
from foreroute.checkpoint.gguf_file import read_gguf
from foreroute.checkpoint.records import STORE_NAME
from foreroute.cli.main import EXIT_ERROR, main
from foreroute.errors import PredictorError
from foreroute.model.text import load_tokenizer
from foreroute.predict.sidecar import SIDECAR_NAME
from foreroute.server.app import create_app
from foreroute.server.backend import Backend, Prompts, Serving
from foreroute.server.settings import Limits, ServerSettings
from tests.cli.harness import Ran
from tests.formats.gguf_writer import write_copy
from tests.support.checkpoints import save_tokenizer

# As unlike as they come: permuted rows; attention of low ranks; a convolution; state spaces; linear attention.
UNLIKE = ("mixtral", "deepseek3", "lfm2moe", "granitehybrid", "qwen35moe")
FAST = ("--memory", "50%", "--threads", "1", "--json")
Files = Callable[[str], Path]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run a command in this process, with a short look at the disk where one measures it; its JSON, or its error."""

    def glance(*args: Any, **options: Any) -> bandwidth.Bandwidth:
        return measure_bandwidth(*args, **{**options, "seconds": 0.02})

    monkeypatch.setattr(bandwidth, "measure_bandwidth", glance)
    monkeypatch.setattr(session, "measure_bandwidth", glance)

    def run_command(*args: str | Path, expect: int = 0) -> Any:
        threads = torch.get_num_threads()
        code = main([str(arg) for arg in args])
        torch.set_num_threads(threads)
        ran = Ran(code, *capfd.readouterr())
        assert code == expect, ran.out + ran.err
        return ran.json if code == 0 else " ".join((ran.out + ran.err).split())

    return run_command


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The ship came into the harbour with nobody on board. " * 25)
    return path


def _copied(path: Path, folder: Path) -> Path:
    for file in path.parent.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder / path.name


@pytest.mark.parametrize("name", UNLIKE)
def test_every_command_takes_the_file(
    name: str, quantised: Files, run: Callable[..., Any], text: Path, tmp_path: Path, load: Callable[..., Any]
) -> None:
    path = _copied(quantised(name), tmp_path)
    sidecar, store = (tmp_path / f"{path.name}.{own}" for own in (SIDECAR_NAME, STORE_NAME))
    fit = ("fit", path, "--text", text, "--context", "32", *FAST)
    fitted = run(*fit)
    assert (fitted["path"], fitted["found_automatically"]) == (str(sidecar), True)
    assert "exists already" in run(*fit, expect=EXIT_ERROR)
    told = run("generate", path, "The ship", "--no-chat", "--max-new-tokens", "6", "--no-do-sample", *FAST)
    assert told["plan"]["predictor"] == "fitted"
    scored = run("score", path, "--text", text, "--tokens", "128", "--context", "32", "--decode", "4", *FAST)
    assert "hybrid" in scored["predictors"]
    plan = run("plan", path, *FAST)["plan"]
    assert (plan["stored_dtype"], plan["source"], plan["math"]) == ("gguf Q8_0", "gguf", "ggml")
    assert _verified(run, path)["plan"]["source"] == "gguf"
    bench = run(
        "bench", path, "--quick", "-p", "8", "-n", "3", "-b", "1", "-r", "1", "--rungs", "cache", "prefetch", *FAST
    )
    assert bench["budgets"], bench
    packed = run("pack", path, "--threads", "1", "--json")
    assert (packed["path"], packed["found_automatically"]) == (str(store), True)
    assert _verified(run, path)["plan"]["source"] == "packed"
    assert _completion(load(path, "50%")) == told["text"]


def _verified(run: Callable[..., Any], path: Path) -> Any:
    prompts = path.parent / "prompts"
    prompts.write_text("The ship\nA quarter to eight\n")
    answer = run("verify", path, "--prompts", prompts, "--tokens", "6", *FAST)
    assert (answer["same"], answer["reference"]) == (True, "resident")
    assert answer["beside_torch"]["same_top"] >= answer["beside_torch"]["steps"] - 2
    return answer


def _completion(model: Any) -> str:
    """What a server answers, over its routes."""
    tokenizer = load_tokenizer(model.foreroute.plan.folder)
    vocabulary = model.config.get_text_config().vocab_size
    prompts = Prompts(tokenizer, vocabulary, Limits())
    engine = BatchEngine(model, tokenizer, 48, 2, 2)
    backend = Backend(Serving(engine, prompts, 48, {}, model))
    with TestClient(create_app(backend, ServerSettings(served_names=("m",))), base_url="http://127.0.0.1:8000") as one:
        answer = one.post("/v1/completions", json={"prompt": "The ship", "max_tokens": 6, "temperature": 0})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_predictors_of_another_file_are_refused(
    quantised: Files, converted: Files, run: Callable[..., Any], text: Path, tmp_path: Path, load: Callable[..., Any]
) -> None:
    """Also of the same model in other blocks, whose file took this one's name."""
    path = _copied(quantised("mixtral"), tmp_path)
    run("fit", path, "--text", text, "--context", "32", *FAST)
    assert load(path, "50%").foreroute.plan.predictor == "fitted"
    shutil.copyfile(converted("mixtral"), path)
    with pytest.raises(PredictorError, match=r"model-q8_0\.gguf\.predictor.* was fitted to another model"):
        load(path, "50%")
    assert load(path, "50%", predictor="no").foreroute.plan.predictor == "lookahead"


def test_a_model_in_parts_has_one_file_of_predictors(
    quantised: Files, run: Callable[..., Any], text: Path, tmp_path: Path, load: Callable[..., Any]
) -> None:
    """It is written beside the first part, whichever is named, and found from any."""
    reader = gguf.GGUFReader(quantised("mixtral"))
    write_copy(reader, gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=9))
    save_tokenizer(tmp_path)
    first, *others = sorted(tmp_path.glob("*.gguf"))
    assert len(others) >= 2
    fitted = run("fit", others[0], "--text", text, "--context", "32", *FAST)
    assert fitted["path"] == f"{first}.{SIDECAR_NAME}"
    for path in (first, others[-1], tmp_path):
        assert load(path, "50%").foreroute.plan.predictor == "fitted"


def test_a_place_that_cannot_be_written_is_said_before_the_fit(
    quantised: Files, run: Callable[..., Any], text: Path
) -> None:
    fit = ("fit", quantised("mixtral"), "--text", text, *FAST)
    said = run(*fit, "--out", "/proc/predictors", expect=EXIT_ERROR)
    assert "/proc/predictors cannot be written" in said
    assert "Choose another --out" in said


def test_verify_names_what_is_damaged(quantised: Files, run: Callable[..., Any], tmp_path: Path) -> None:
    """A GGUF file has no checksums: what shows is a scale that is no number, and an end that is absent."""
    path = _copied(quantised("deepseek3"), tmp_path)
    content = path.read_bytes()
    entry = read_gguf(path).tensors["blk.1.ffn_up_exps.weight"]
    damaged = bytearray(content)
    for expert in range(entry.shape[0]):
        at = entry.offset + expert * (entry.nbytes // entry.shape[0])
        damaged[at : at + 2] = b"\x00\x7e"  # NaN in float16
    path.write_bytes(damaged)
    verify = ("verify", path, "--tokens", "4", *FAST)
    assert "of MoE layer 0 gives outputs" in run(*verify, expect=EXIT_ERROR)
    path.write_bytes(content[:-40])
    assert f"{path} is not a complete GGUF file" in run(*verify, expect=EXIT_ERROR)
    path.write_bytes(content)
    packed = Path(run("pack", path, "--threads", "1", "--json")["path"])
    damaged = bytearray(packed.read_bytes())
    damaged[-20_000:] = bytes(20_000)
    packed.write_bytes(damaged)
    said = run(*verify, expect=EXIT_ERROR)
    assert str(packed) in said
    assert "expert" in said
