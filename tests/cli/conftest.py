"""A tiny model, and `run`: the command line in this process."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.cli.main import main
from tests.cli.harness import Ran, make_tokenizer, save_model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Qwen3-MoE of 3 MiB of experts that never ends by itself."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder)
    return folder


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    """A folder of the same model in which a test may write: links to the files."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for file in tiny.iterdir():
        os.link(file, folder / file.name)
    return folder


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    """The command line sets torch's threads for the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command in this process; argparse's exits become codes too."""

    def run_command(*args: str | Path) -> Ran:
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Ran(code, *capfd.readouterr())

    return run_command
