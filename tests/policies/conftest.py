"""Tiny checkpoints with everything fitted to them, from few tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.checkpoint.locate import read_index
from foreroute.predict.sidecar import Sidecar
from foreroute.prepare.corpus import Corpus
from foreroute.prepare.estimator_training import EstimatorSettings
from foreroute.prepare.fit import FitSettings, fit

SETTINGS = FitSettings(rows=4, estimator=EstimatorSettings(epochs=1, batch=64))
FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3")


@pytest.fixture(scope="session")
def sidecars(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's fitted predictors, in a file of their own; made once."""
    import foreroute

    folder = tmp_path_factory.mktemp("sidecars")

    def path_of(family: str) -> Path:
        path, checkpoint = folder / f"{family}.safetensors", checkpoints.get(family)
        if not path.exists():
            model = foreroute.load(checkpoint, "100%", config=foreroute.EngineConfig(predictor="no"))
            ids = torch.randint(5, 240, (24, 32), generator=torch.Generator().manual_seed(2))
            fit(model, read_index(checkpoint).fingerprint(), Corpus(ids, "random"), path, settings=SETTINGS)
            model.foreroute.close()
        return path

    return path_of


@pytest.fixture
def fitted(sidecars: Callable[[str], Path], checkpoints: Any) -> Callable[[str], Sidecar]:
    """What is in that file."""
    return lambda family: Sidecar.load(sidecars(family), read_index(checkpoints.get(family)).fingerprint())
