"""The files that llama.cpp's converter wrote, unpacked once."""

import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.converted.convert import CONVERTED
from tests.converted.copies import write_q8_0
from tests.support.checkpoints import save_tokenizer


@pytest.fixture(scope="session")
def converted(_torch_setup: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`converted(name)`: the file of a tiny model, a tokenizer beside it."""
    root = tmp_path_factory.mktemp("converted")
    save_tokenizer(root)

    def get(name: str) -> Path:
        path = root / f"{name}.gguf"
        if not path.is_file():
            path.write_bytes(lzma.decompress((CONVERTED / f"{name}.gguf.xz").read_bytes()))
        return path

    return get


@pytest.fixture(scope="session")
def quantised(converted: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`quantised(name)`: the same in Q8_0, in a folder of its own. Tests write beside copies of it."""
    root = tmp_path_factory.mktemp("quantised")

    def get(name: str) -> Path:
        path = root / name / "model-q8_0.gguf"
        if not path.is_file():
            path.parent.mkdir()
            write_q8_0(name, converted(name), path)
        return path

    return get
