"""`foreroute generate` straight from what people have: any part of a model, ollama's blob, an id on the hub."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.cli.main import main
from tests.converted.copies import write_q8_0
from tests.hub.fake_hub import names, serving

ROOT = Path(__file__).parents[2]
NAME = "qwen35moe"
ARGS = ("the in", "--memory", "60%", "--max-new-tokens", "12", "--threads", "1", "--json")


@pytest.fixture(scope="module")
def repository(converted: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converter's files, each with its own tokenizer: F32, and Q8_0 in parts; beside them what is no model."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copyfile(converted(NAME), folder / "Tiny-F32.gguf")
    write_q8_0(NAME, converted(NAME), folder / "Q8_0" / "Tiny-Q8_0.gguf", own_tokenizer=True, per_part=24)
    (folder / "mmproj-Tiny-Q8_0.gguf").write_text("no model")
    (folder / "README.md").write_text("Two quantisations.")
    return folder


@pytest.fixture(scope="module")
def blob(converted: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in Q8_0 as ollama keeps it: no ending, nothing beside it but other blobs."""
    path = tmp_path_factory.mktemp("ollama") / "blobs" / "sha256-6a7b"
    write_q8_0(NAME, converted(NAME), path, own_tokenizer=True)
    path.with_name("sha256-0c1d").write_text("{{ .Prompt }}")
    return path


@pytest.fixture
def generated(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[Path], list[int]]]:
    """The tokens that the command writes, in this process."""
    threads = torch.get_num_threads()

    def run(model: Path) -> list[int]:
        capfd.readouterr()
        assert main(["generate", str(model), *ARGS]) == 0
        return list(json.loads(capfd.readouterr().out)["token_ids"])

    yield run
    torch.set_num_threads(threads)


def test_from_ollamas_blob_and_from_any_part(
    blob: Path, repository: Path, tmp_path: Path, generated: Callable[[Path], list[int]]
) -> None:
    shutil.copyfile(blob, tmp_path / "model.gguf")
    expected = generated(tmp_path / "model.gguf")
    assert len(expected) == 12
    assert generated(blob) == expected
    parts = sorted((repository / "Q8_0").iterdir())
    assert len(parts) >= 3
    for part in parts:
        assert generated(part) == expected, part.name


def test_from_a_hub_id_with_a_quantisation(
    blob: Path, repository: Path, tmp_path: Path, generated: Callable[[Path], list[int]]
) -> None:
    """The parts of that one are downloaded, once; every command that takes a model takes the id."""

    def run(command: str, *args: str, **environment: str) -> Any:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {**kept, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from foreroute.cli.main import main; sys.exit(main())", command,
             "org/tiny:q8_0", *args],
            env={**settings, **environment}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with serving(repository) as hub:
        found = run("generate", *ARGS, "--revision", "v1")
        assert found["token_ids"] == generated(blob)
        assert set(hub.sent) == {name for name in names(repository) if name.startswith("Q8_0/")}
        num_asked = len(hub.asked)
        planned = run("plan", "--memory", "60%", "--json", "--revision", "v1", HF_HUB_OFFLINE="1")
        assert planned["plan"]["folder"].endswith("/Q8_0/Tiny-Q8_0-00001-of-00004.gguf")
        assert len(hub.asked) == num_asked, "the cache does"
