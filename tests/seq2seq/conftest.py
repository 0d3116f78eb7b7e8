"""Tiny encoder-decoders, and transformers' own models of them, made once per session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.seq2seq import CONFIGS, resident, save_seq2seq


@pytest.fixture(scope="session")
def folder_of(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a family; tests must not change it."""
    root = tmp_path_factory.mktemp("seq2seq")

    @cache
    def made(family: str) -> Path:
        return save_seq2seq(CONFIGS[family](), root / family)

    return made


@pytest.fixture(scope="session")
def resident_of(folder_of: Callable[[str], Path]) -> Callable[[str], Any]:
    """transformers' model of a family's checkpoint."""

    @cache
    def made(family: str) -> Any:
        return resident(folder_of(family))

    return made


@pytest.fixture(scope="session")
def switch(folder_of: Callable[[str], Path]) -> Path:
    """A Switch Transformers' folder."""
    return folder_of("switch_transformers")
