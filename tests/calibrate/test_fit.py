"""A fit is deterministic, goes on where it was killed, and helps the engine without changing a token."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.calibrate.corpus import Corpus
from foreroute.calibrate.fit import partial_path
from foreroute.calibrate.score import score
from foreroute.calibrate.watch import Watch
from foreroute.checkpoint.index import read_index
from foreroute.errors import PredictorError
from foreroute.predict.sidecar import SIDECAR_NAME, Sidecar
from tests.calibrate.conftest import CONTEXT, SETTINGS
from tests.support.runs import assert_same_bits, generate


class KilledError(Exception):
    """Stands for a process that dies."""


@pytest.fixture(scope="module")
def fitted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs it leaves its fit."""
    return tmp_path_factory.mktemp("fitted") / SIDECAR_NAME


@pytest.fixture
def sidecar(fitted: Path, folder: Path, fit_to: Callable[..., Sidecar]) -> Path:
    if not fitted.exists():
        fit_to(folder, fitted)
    return fitted


def test_the_same_bytes_whatever_the_memory(sidecar: Path, folder: Path, fit_to: Any, tmp_path: Path) -> None:
    fit_to(folder, tmp_path / "again", memory="25%")
    assert (tmp_path / "again").read_bytes() == sidecar.read_bytes()
    assert not partial_path(tmp_path / "again").exists()


def test_a_killed_fit_goes_on_and_ends_with_the_same_bytes(
    sidecar: Path, folder: Path, fit_to: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "resumed", list[int]()

    def kill(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 4:
            raise KilledError

    with pytest.raises(KilledError):
        fit_to(folder, path, progress=kill, save_every_s=0)
    assert partial_path(path).exists()
    assert not path.exists()
    runs, run = list[int](), Watch.run
    monkeypatch.setattr(Watch, "run", lambda self, windows, index: (runs.append(index), run(self, windows, index)))
    fit_to(folder, path, save_every_s=0)
    assert path.read_bytes() == sidecar.read_bytes()
    # Four passes were done; the others of the fit and those of the held-out windows follow.
    assert runs[0] == 4
    assert not partial_path(path).exists()


def test_sums_of_other_settings_are_not_taken_over(sidecar: Path, folder: Path, fit_to: Any, tmp_path: Path) -> None:
    path = tmp_path / "changed"

    def kill(done: int, total: int) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        fit_to(folder, path, progress=kill, save_every_s=0)
    passes: list[int] = []
    settings = replace(SETTINGS, penalty=0.1)
    fit_to(folder, path, settings=settings, progress=lambda done, total: passes.append(done))
    # From the first pass on.
    assert passes[0] == SETTINGS.rows * CONTEXT
    assert Sidecar.load(path, read_index(folder).fingerprint()).about["settings"]["penalty"] == 0.1


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_tokens_are_the_same_with_a_sidecar_and_its_guesses_are_used(
    family: str, checkpoints: Any, load: Any, fit_to: Any, references: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoints.get(family).iterdir():
        os.link(file, folder / file.name)
    expected = references.output(checkpoints.get(family))
    fit_to(folder, folder / SIDECAR_NAME)
    model = load(folder, "50%")
    assert model.foreroute.plan.predictor == "fitted"
    assert_same_bits(generate(model), expected)
    assert model.foreroute.stats().prefetch_used > 0
    guesses = model.foreroute.runtime._predictor
    assert len(guesses.guess_first(torch.tensor([5]))) == model.foreroute.layers[0].top_k
    ignoring = load(folder, "50%", predictor="no")
    assert ignoring.foreroute.plan.predictor == "lookahead"


def test_default_vectors_in_the_engine_read_the_residual(
    folder: Path, sidecar: Path, load: Any, references: Any, tmp_path: Path
) -> None:
    chosen = Sidecar.load(sidecar, read_index(folder).fingerprint())
    path = tmp_path / "default-vectors"
    replace(chosen, choice=["default vectors"] * (len(chosen.choice) - 1) + [None]).save(path)
    model = load(folder, "50%", predictor=str(path))
    guesses: list[int] = []
    predictor = model.foreroute.runtime._predictor
    guess = predictor.guess
    predictor.guess = lambda *seen: (made := guess(*seen), guesses.append(len(made)))[0]
    assert_same_bits(generate(model), references.output(folder))
    assert set(guesses) == {3}


def test_a_sidecar_of_another_model_is_refused(sidecar: Path, checkpoints: Any, load: Any) -> None:
    with pytest.raises(PredictorError, match="another model"):
        load(checkpoints.get("qwen3_moe", seed=1), predictor=str(sidecar))


def test_controls_read_what_they_must(folder: Path, sidecar: Path, corpus: Corpus, load: Any) -> None:
    model = load(folder, "50%", predictor="no")
    opened = Sidecar.load(sidecar, read_index(folder).fingerprint())
    scores = score(model, corpus.windows, opened, rows=5).as_dict()
    assert scores["k"] == 3
    predictors = scores["predictors"]
    for figure in ("recall_k", "exact_set_k", "recall_2k"):
        assert predictors["oracle"][figure] == [1.0, 1.0, 1.0]
    assert predictors["oracle"]["missed_mass"] == pytest.approx([0, 0, 0], abs=1e-12)
    slots = 3 * corpus.num_tokens
    for name, width in (("recall_k", 3), ("recall_k2", 5), ("recall_2k", 6)):
        share = width / 16
        for measured in predictors["random"][name]:
            assert abs(measured - share) < 5 * (share * (1 - share) / slots) ** 0.5
    ridge = predictors["ridge"]["mean"]["recall_k"]
    assert ridge > predictors["shuffled"]["mean"]["recall_k"] + 0.2
    assert ridge > predictors["popularity"]["mean"]["recall_k"]
    assert predictors["lookahead"]["recall_k"][0] is None
    assert predictors["hybrid"]["recall_k"][0] == predictors["token table"]["recall_k"][0]
    assert predictors["hybrid"]["cost_us"] > 0
    # It knows more: the layer's input, where the others know that of the layer before.
    before = predictors["before attention"]["recall_k"]
    assert None not in before
    assert before[1] > predictors["shuffled"]["recall_k"][1] + 0.2


def test_nobody_watches_after_a_fit(folder: Path, sidecar: Path, corpus: Corpus, load: Any) -> None:
    model = load(folder, "50%", predictor="no")
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    score(model, corpus.windows[:2], None, rows=2)
    runtime = model.foreroute.runtime
    assert runtime.observer is None
    assert runtime.expert_listener is None
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
