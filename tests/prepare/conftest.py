"""A tiny checkpoint, text for it, and `fit_to`: a fit of it to that text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.checkpoint.locate import read_index
from foreroute.model.text import load_tokenizer
from foreroute.predict.sidecar import Sidecar
from foreroute.prepare.corpus import Corpus, read_corpus
from foreroute.prepare.estimator_training import EstimatorSettings
from foreroute.prepare.fit import FitSettings, fit

CONTEXT = 32
# A buffer for 200 of 960 tokens: the estimator is trained in turns, between passes.
ESTIMATOR = EstimatorSettings(epochs=1, batch=128, buffer_bytes=200 * 2 * (64 + 16) * 2)
SETTINGS = FitSettings(rows=3, held_out_every=4, estimator=ESTIMATOR)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some thousand characters in which the next one is not arbitrary."""
    words = ("one", "two", "three", "four", "five", "six", "seven")
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(0, len(words), (400,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(words[at] for at in drawn))
    return path


@pytest.fixture(scope="session")
def folder(checkpoints: Any) -> Path:
    return checkpoints.get("qwen3_moe")


@pytest.fixture(scope="session")
def corpus(folder: Path, text: Path) -> Corpus:
    return read_corpus(load_tokenizer(folder), [text], num_tokens=40 * CONTEXT, context=CONTEXT)


@pytest.fixture
def fit_to(load: Callable[..., Any], corpus: Corpus) -> Callable[..., Sidecar]:
    """Fit the checkpoint in a folder and write to a path; keywords go to `fit`."""

    def fitting(folder: Path, path: Path, memory: str = "50%", **options: Any) -> Sidecar:
        model = load(folder, memory, predictor="no")
        return fit(model, read_index(folder).fingerprint(), corpus, path, **{"settings": SETTINGS, **options})

    return fitting
