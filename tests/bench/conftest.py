"""A tiny random model, its tests and `run`: shared with the command line's."""

from pathlib import Path

import pytest
import torch

from foreroute.bench.asked import Asked
from foreroute.bench.rungs import RUNG_NAMES, rungs_named
from foreroute.config import EngineConfig
from tests.cli.conftest import copied as copied
from tests.cli.conftest import run as run
from tests.cli.conftest import same_threads_afterwards as same_threads_afterwards
from tests.cli.conftest import tiny as tiny


@pytest.fixture
def asked() -> Asked:
    """Little of everything; tests replace what they are about."""
    return Asked(
        memories=("25%",),
        may_drop=False,
        prompts=(12,),
        new_tokens=10,
        batches=(1,),
        repeats=2,
        rungs=rungs_named(RUNG_NAMES),
        dtype="auto",
        config=EngineConfig(),
    )


@pytest.fixture
def without_tokenizer(tiny: Path, tmp_path: Path) -> Path:
    """The same model without a tokenizer."""
    folder = tmp_path / "mute"
    folder.mkdir()
    for file in tiny.iterdir():
        if not file.name.startswith("tokenizer"):
            (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture
def random_rows() -> torch.Tensor:
    """[2, 20] token ids that the tiny model knows."""
    return torch.randint(4, 260, (2, 20), generator=torch.Generator().manual_seed(3))
