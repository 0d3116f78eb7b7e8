"""One model of each kind of cache, and engines that are closed at the end."""

from pathlib import Path

import pytest

from foreroute.batching.engine import BatchEngine
from foreroute.model.text import load_tokenizer
from tests.families.checks import save_tiny
from tests.families.test_families import WORKING

TINY = Path(__file__).parents[2] / "models" / "foreroute-tiny"
# Plain attention, windows that a chunk slides out of, and states of linear attention.
FAMILIES = ("qwen3_moe", "gpt_oss", "qwen3_next")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = next(one for one in WORKING if one.model_type == "qwen3_next")
    return save_tiny(family, tmp_path_factory.mktemp("hybrid") / "qwen3_next")


@pytest.fixture(params=FAMILIES)
def model(request, checkpoints, load, hybrid):
    return load(hybrid if request.param == "qwen3_next" else checkpoints.get(request.param), "50%")


@pytest.fixture
def engine_of(tokenizer):
    engines = []

    def make(model, **kwargs):
        engines.append(BatchEngine(model, tokenizer, 512, **kwargs))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
