"""The files that llama.cpp's converter wrote, unpacked once."""

import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.converted.convert import CONVERTED
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
