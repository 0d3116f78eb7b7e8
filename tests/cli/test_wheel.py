"""An installed wheel is enough for `foreroute demo`, `generate` and `chat`: the model is in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.wheel import ROOT, build_wheel

MODEL_FILES = {
    "README.md", "config.json", "curves.png", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, to be found before this environment's packages."""
    folder = tmp_path_factory.mktemp("site")
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(folder)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    return folder


def run(site: Path, folder: Path, *args: str, say: str = "") -> str:
    """What the installed command writes to standard output, run in the folder."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(site / "bin" / "foreroute"), *args],
        cwd=folder,
        env=environment,
        input=say,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_carries_the_demos_model(site: Path) -> None:
    model = site / "foreroute" / "models" / "foreroute-tiny"
    # These alone: nothing that a fit or a pack has left beside them.
    assert {path.name for path in model.iterdir()} == MODEL_FILES
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (model / file).read_bytes() == (ROOT / "models" / "foreroute-tiny" / file).read_bytes()


def test_the_wheel_is_the_package_alone(site: Path) -> None:
    """No test, nor a file of theirs: these are in the repository."""
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"bin", "foreroute"}
    files = [path for path in site.rglob("*") if path.is_file() and "models" not in path.parts]
    assert {path.suffix for path in files} & {".gguf", ".xz", ".npz", ".safetensors"} == set()
    assert not [path for path in files if path.name.startswith(("test_", "conftest"))]


def test_its_demo_finds_the_model_and_the_same_tokens(site: Path, tmp_path: Path) -> None:
    assert "same tokens as the resident model: yes" in run(site, tmp_path, "demo")
    script = "from foreroute.cli.commands import demo; print(demo.find_model())"
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert Path(found) == site / "foreroute" / "models" / "foreroute-tiny"


def test_it_generates_and_chats(site: Path, tmp_path: Path) -> None:
    model = str(site / "foreroute" / "models" / "foreroute-tiny")
    flags = ("--memory", "25%", "--max-new-tokens", "8", "--no-do-sample", "--threads", "1")
    written = run(site, tmp_path, "generate", model, "12 + 30", "--quiet", *flags).strip()
    assert written
    assert run(site, tmp_path, "chat", model, *flags, say="12 + 30\n").strip() == written
