"""Checkpoints in the formats that people publish, made once per session."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def published(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`published(write, family, dtype="bf16")`: that family's tiny checkpoint rewritten by a writer of quantised.py."""
    root = tmp_path_factory.mktemp("published")

    def path_of(write: Callable[[Path, Path], Path], family: str, dtype: str = "bf16") -> Path:
        folder = root / f"{family}-{dtype}-{write.__name__}"
        return folder if folder.is_dir() else write(checkpoints.get(family, dtype), folder)

    return path_of
