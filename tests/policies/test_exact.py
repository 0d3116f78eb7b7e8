"""Exact decoding under every predictor says what the resident model says, bit for bit, whatever is guessed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foreroute.predict import build as known
from foreroute.predict.sidecar import Sidecar
from tests.policies.conftest import FAMILIES
from tests.support.runs import ONE_PROMPT, THREE_PROMPTS, assert_same_bits, generate

PREDICTORS = (known.LOOKAHEAD, known.DEFAULT_VECTORS, known.RIDGE, known.ESTIMATOR)


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_predictor_is_exact(
    family: str, predictor: str, fitted: Any, load: Any, checkpoints: Any, references: Any, tmp_path: Path
) -> None:
    sidecar: Sidecar = fitted(family)
    if predictor == known.ESTIMATOR:
        assert sidecar.estimator, "the fit trained none"
    path = tmp_path / "chosen.safetensors"
    replace(sidecar, choice=[*[predictor] * (len(sidecar.choice) - 1), None]).save(path)
    folder = checkpoints.get(family)
    for memory in ("25%", "50%"):
        model = load(folder, memory, predictor=str(path))
        for batch in (ONE_PROMPT, THREE_PROMPTS):
            assert_same_bits(generate(model, batch), references.output(folder, batch))
        stats = model.foreroute.stats()
        assert stats.decode.prefetch_used > 0
        assert stats.evictions > 0
        assert stats.decode.substituted == 0
