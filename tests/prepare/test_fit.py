"""A fit is deterministic, goes on where it was killed, and helps the engine without changing a token."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from foreroute.checkpoint.locate import read_index
from foreroute.errors import PredictorError
from foreroute.predict.base import RouterSample, TokenGuess
from foreroute.predict.sidecar import SIDECAR_NAME, Sidecar
from foreroute.prepare.corpus import Corpus
from foreroute.prepare.fit import fit, partial_path
from foreroute.prepare.on_policy import Substitutes
from foreroute.prepare.score import score
from foreroute.prepare.watch import Watch, watching
from tests.prepare.conftest import CONTEXT, SETTINGS
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
    guesses = model.foreroute.engine.prefetcher.predictor
    assert len(guesses.guess_first(torch.tensor([5]))) == model.foreroute.layers[0].top_k
    ignoring = load(folder, "50%", predictor="no")
    assert ignoring.foreroute.plan.predictor == "lookahead"


def test_default_vectors_in_the_engine_read_the_residual(
    folder: Path, sidecar: Path, load: Any, references: Any, tmp_path: Path
) -> None:
    chosen = Sidecar.load(sidecar, read_index(folder).fingerprint())
    path = tmp_path / "default-vectors"
    replace(chosen, choice=["default vectors"] * (len(chosen.choice) - 1) + [None]).save(path)
    model = load(folder, "50%", predictor=str(path), prefetch_prefill="off")
    guesses: list[int] = []
    predictor = model.foreroute.engine.prefetcher.predictor
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


def test_nothing_is_observed_after_a_fit(folder: Path, sidecar: Path, corpus: Corpus, load: Any) -> None:
    model = load(folder, "50%", predictor="no")
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    score(model, corpus.windows[:2], None, rows=2)
    engine = model.foreroute.engine
    assert engine.routing_listener is None
    assert engine.expert_listener is None
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_a_second_round_on_a_policys_states_is_resumed_and_ends_with_the_same_bytes(
    folder: Path, fit_to: Any, load: Any, corpus: Corpus, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, on_policy=True)
    fit_to(folder, tmp_path / "exact")
    fit_to(folder, tmp_path / "twice", settings=settings)
    fingerprint = read_index(folder).fingerprint()
    exact, twice = (Sidecar.load(tmp_path / name, fingerprint) for name in ("exact", "twice"))
    assert (exact.about["states"], twice.about["states"]) == ("exact", "speculative")
    # Layer 0 is exact in both; later layers saw substitutes.
    assert exact.ridge[0] is not None
    assert twice.ridge[0] is not None
    torch.testing.assert_close(exact.ridge[0].from_hidden, twice.ridge[0].from_hidden)
    assert exact.ridge[1] is not None
    assert twice.ridge[1] is not None
    assert not torch.equal(exact.ridge[1].from_hidden, twice.ridge[1].from_hidden)

    seen = list[int]()

    def kill(done: int, total: int) -> None:
        seen.append(done)
        if done > corpus.num_tokens + 2 * SETTINGS.rows * CONTEXT:
            raise KilledError

    with pytest.raises(KilledError):
        fit_to(folder, tmp_path / "resumed", settings=settings, progress=kill, save_every_s=0)
    seen.clear()
    fit_to(folder, tmp_path / "resumed", settings=settings, progress=lambda done, total: seen.append(done))
    assert seen[0] > corpus.num_tokens
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "twice").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"exact", "twice", "resumed"}


def test_experts_that_were_not_guessed_are_substituted_and_no_others(folder: Path, fit_to: Any, load: Any) -> None:
    model = load(folder, "50%", predictor="no")
    layers = model.foreroute.layers
    windows = torch.arange(24).view(1, 24)
    logits = model(input_ids=windows, use_cache=False).logits

    class Knows:
        """Guesses what it is told to."""

        def __init__(self, width: int) -> None:
            self.width = width

        def guess(self, layer: int, seen: Any, width: int) -> TokenGuess:
            ids = torch.arange(self.width).expand(len(seen.ids), -1)
            return TokenGuess(ids, ids.float())

    vectors = [torch.ones(layer.experts.num_offloaded, model.config.hidden_size) for layer in layers]
    moments: list[Any] = []
    for width in (16, 0):
        with watching(model, lambda moment, _: moments.append(moment), None, Substitutes(Knows(width), vectors)):
            seen = model(input_ids=windows, use_cache=False).logits
        assert torch.equal(seen, logits) == (width == 16)
    assert torch.equal(model(input_ids=windows, use_cache=False).logits, logits)
    # Nothing guessed: all of a layer but the first is default vectors, weights summing to the gate mass.
    exact, without = moments[: len(layers)], moments[len(layers) :]
    assert torch.equal(exact[1].now.hidden, without[1].now.hidden)
    assert not torch.equal(exact[2].now.hidden, without[2].now.hidden)
    assert (without[1].now.weights > 0).all()


def test_resident_experts_are_computed_and_the_rest_substituted(folder: Path, load: Any) -> None:
    model = load(folder, "50%", predictor="no")
    watch = Watch(model, lambda moment, _: None)
    hidden, width = torch.randn(5, model.config.hidden_size), model.foreroute.layers[1].experts.num_offloaded
    ids = torch.tensor([[0, 1, 9], [2, 8, 3], [4, 5, 6], [9, 10, 11], [0, 7, 15]])
    weights = torch.rand(5, 3)

    class KnowsTheFirstEight:
        def guess(self, layer: int, seen: RouterSample, width: int) -> TokenGuess:
            return TokenGuess(torch.arange(8).expand(5, -1), torch.ones(5, 8))

    def compute(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return 100 * weights.sum(-1, keepdim=True).expand_as(hidden)

    vectors = [torch.ones(width, hidden.shape[1])] * len(model.foreroute.layers)
    forward = watch.without_missing(1, compute, Substitutes(KnowsTheFirstEight(), vectors))
    watch._windows = torch.zeros(1, 5, dtype=torch.int64)
    watch._before = RouterSample(hidden, ids, weights)
    there = (weights * (ids < 8)).sum(-1, keepdim=True)
    expected = 100 * there + (weights.sum(-1, keepdim=True) - there)
    torch.testing.assert_close(forward(hidden, ids, weights), expected.expand_as(hidden))
    # Layer 0 has no guess, and waits.
    watch._before = None
    torch.testing.assert_close(forward(hidden, ids, weights), compute(hidden, ids, weights))
    watch.tap.remove()


def test_states_that_are_not_finite_are_named(folder: Path, fit_to: Any, load: Any, corpus: Corpus) -> None:
    model = load(folder, "50%", predictor="no")
    model.get_input_embeddings().weight.data[:] = float("nan")
    with pytest.raises(PredictorError, match=r"MoE layer 0 .* not finite"):
        fit(model, "any", corpus, folder / "never-written", settings=SETTINGS)
    assert not (folder / "never-written").exists()


def test_predictors_of_another_layout_are_refused(folder: Path, sidecar: Path, load: Any, tmp_path: Path) -> None:
    whole = Sidecar.load(sidecar, read_index(folder).fingerprint())
    replace(whole, popularity=[counts[:-1] for counts in whole.popularity]).save(tmp_path / "narrow")
    with pytest.raises(PredictorError, match="Fit again"):
        load(folder, predictor=str(tmp_path / "narrow"))
    narrow = [None if one is None else replace(one, from_hidden=one.from_hidden[:-1]) for one in whole.ridge]
    replace(whole, ridge=narrow).save(tmp_path / "thin")
    with pytest.raises(PredictorError, match="hidden width of"):
        load(folder, predictor=str(tmp_path / "thin"))
