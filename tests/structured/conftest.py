"""Grammars for the small model that ships: its tokenizer, and a compiler of grammars over a vocabulary as large."""

from typing import Any

import pytest

pytest.importorskip("llguidance", reason="needs llguidance: pip install foreroute[structured]")

from foreroute.cli.commands import demo
from foreroute.model.text import load_tokenizer
from foreroute.structured.compiler import GrammarCompiler

VOCABULARY, ENDS = 4096, (0, 4)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(demo.find_model())


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCABULARY, ENDS)
