"""Fit a model's predictors to any text, in one pass: sums over most windows, then a choice on the held-out ones."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from foreroute.errors import PredictorError
from foreroute.loading.offloaded_model import OffloadedModel, handle_of
from foreroute.model.blocks import first_decoded
from foreroute.predict import build as known
from foreroute.predict.sidecar import Sidecar, read_whole, write_whole
from foreroute.prepare.corpus import Corpus
from foreroute.prepare.estimator_training import EstimatorSettings
from foreroute.prepare.on_policy import Substitutes
from foreroute.prepare.score import Scorer, guessers_of, run_passes
from foreroute.prepare.sums import Sums
from foreroute.prepare.watch import watching
from foreroute.types import Progress


@dataclass(frozen=True)
class FitSettings:
    """All settings that decide the bytes of the result, besides the model and the text.

    rows: windows per forward pass. held_out_every: one window of this number is held out. penalty: of the ridge,
    relative to each feature's variance. estimator: settings to train the paper's estimator too; None not to.
    on_policy: fit a second time, on the states of a run that never waits: experts that the first fit did not predict
    are substituted.
    """

    rows: int = 8
    held_out_every: int = 8
    penalty: float = 1e-3
    estimator: EstimatorSettings | None = None
    on_policy: bool = False


def partial_path(path: Path) -> Path:
    """Path where an unfinished fit keeps its sums."""
    return path.with_name(path.name + ".partial")


def fit(
    model: OffloadedModel,
    fingerprint: str,
    corpus: Corpus,
    path: Path,
    *,
    settings: FitSettings | None = None,
    progress: Progress = lambda done, total: None,
    resume: bool = True,
    save_every_s: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
) -> Sidecar:
    """Fit everything to `model` and write the sidecar `path`; works with the experts offloaded.

    A stopped fit continues from its last saved sums, and ends with the same bytes, if the number of torch threads is
    the same: sums in another order differ in their last bits.

    Args:
        model: of `foreroute.load`. fingerprint: of its checkpoint. corpus: the text. settings: None for the defaults.
        progress: called with (tokens done, all tokens) after each forward pass. resume: False starts anew.
        save_every_s: how often the sums are saved, in seconds by `clock`.
    Raises:
        PredictorError: a file cannot be written. RefusedError: not a model of `load`.
    Cost: a prefill of the text, and rows x features^2 multiply-adds per layer. Memory: see `Sums`.
    """
    layers, settings = handle_of(model).layers, settings or FitSettings()
    about = {
        "corpus": corpus.digest,
        "context": corpus.windows.shape[1],
        "settings": asdict(settings),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype),
    }
    num_rounds = 2 if settings.on_policy else 1
    total = num_rounds * corpus.num_tokens
    # Where a fit in two rounds keeps the result of its first.
    first_path = path.with_name(path.name + ".exact")

    def round_of(number: int, substitutes: Substitutes | None) -> Sidecar:
        keeper_of = partial(
            _Keeper, partial_path(path), about={**about, "fingerprint": fingerprint, "round": number},
            save_every_s=save_every_s, clock=clock, resume=resume,
        )  # fmt: skip
        done_before = number * corpus.num_tokens
        return _round(
            model, fingerprint, corpus, settings, keeper_of, about, substitutes,
            lambda done: progress(done_before + done, total),
        )  # fmt: skip

    if not settings.on_policy:
        sidecar = round_of(0, None)
    else:
        exact = _first_round(first_path, fingerprint, about) if resume else None
        if exact is None:
            exact = round_of(0, None)
            exact.save(first_path)
            partial_path(path).unlink(missing_ok=True)
        policy = Substitutes(known.hybrid(layers, model.dtype, exact), exact.default_vectors)
        sidecar = round_of(1, policy)
    sidecar.save(path)
    partial_path(path).unlink(missing_ok=True)
    if settings.on_policy:
        first_path.unlink(missing_ok=True)
    return sidecar


def _first_round(path: Path, fingerprint: str, about: dict[str, Any]) -> Sidecar | None:
    """Read the exact round's result of the same fit, if that was stopped in its second round."""
    try:
        saved = Sidecar.load(path, fingerprint)
    except PredictorError:
        return None
    return saved if all(saved.about.get(name) == value for name, value in about.items()) else None


def _round(
    model: OffloadedModel,
    fingerprint: str,
    corpus: Corpus,
    settings: FitSettings,
    keeper_of: Callable[[Sums], "_Keeper"],
    about: dict[str, Any],
    substitutes: Substitutes | None,
    progress: Callable[[int], None],
) -> Sidecar:
    """Sum over most windows, solve, and choose on the held-out ones: on exact states, or with substitutes."""
    train, held_out = corpus.split(settings.held_out_every)
    sums = Sums(model, settings.estimator, num_tokens=train.numel())
    keeper = keeper_of(sums)
    num_resumed = keeper.num_passes
    with watching(model, sums.on_moment, sums.on_rows, substitutes) as watch:

        def run(windows: torch.Tensor, index: int) -> None:
            if index >= num_resumed:
                watch.run(windows, index)
                keeper.after_pass(index + 1)

        run_passes(run, train, settings.rows, lambda done, _: progress(done))
    sidecar = _solved(sums, fingerprint, settings)
    scorer = _scored(
        model, sidecar, held_out, settings.rows, substitutes, lambda done, _: progress(train.numel() + done)
    )
    # The token table predicts layer 0 alone, so that it is no alternative here.
    of_next = [name for name in scorer.tallies if name != known.TOKEN_TABLE]
    missed = {name: scorer.tallies[name].as_dict()["missed_mass"] for name in of_next}
    return replace(
        sidecar,
        # A layer predicts the layer after it.
        choice=[*choose({name: layers[1:] for name, layers in missed.items()}), None],
        about={
            **about,
            "states": "exact" if substitutes is None else "speculative",
            "tokens": {"fitted": train.numel(), "held_out": held_out.numel()},
            "held_out": {name: tally.as_dict() for name, tally in scorer.tallies.items()},
        },
    )


def _solved(sums: Sums, fingerprint: str, settings: FitSettings) -> Sidecar:
    """Solve the sums for predictors, without choosing between them."""
    if sums.estimator is not None:
        sums.estimator.train()
    return Sidecar(
        fingerprint,
        ridge=[*(one.solve(settings.penalty) if one.equations.num_rows else None for one in sums.ridge), None],
        default_vectors=[outputs.means() if int(outputs.counts.sum()) else None for outputs in sums.outputs],
        token_table=sums.table.solve(sums.all_embeddings(), settings.penalty)
        if sums.table.equations.num_rows
        else None,
        popularity=sums.popularity,
        choice=[None] * len(sums.outputs),
        estimator={} if sums.estimator is None else sums.estimator.weights,
    )


def _scored(
    model: OffloadedModel,
    sidecar: Sidecar,
    held_out: torch.Tensor,
    rows: int,
    substitutes: Substitutes | None,
    progress: Progress,
) -> Scorer:
    """Score every predictor of the sidecar on the held-out windows."""
    candidates = known.fitted(model.foreroute.layers, model.dtype, sidecar)
    first = first_decoded(model.foreroute.layers)
    scorer = Scorer(guessers_of(candidates, sidecar, model), len(sidecar.choice), first)
    with watching(model, scorer.on_moment, substitutes=substitutes) as watch:
        run_passes(watch.run, held_out, rows, progress)
    return scorer


class _Keeper:
    """Saves the sums at intervals, and restores them."""

    def __init__(
        self,
        path: Path,
        sums: Sums,
        about: dict[str, Any],
        save_every_s: float,
        clock: Callable[[], float],
        resume: bool,
    ) -> None:
        self._path = path
        self._sums = sums
        self._about = about
        self._save_every_s = save_every_s
        self._clock = clock
        self._saved_at = clock()
        # Forward passes in the saved sums of the same model, text, settings and round.
        self.num_passes = self._resume() if resume else 0

    def _resume(self) -> int:
        if not self._path.exists():
            return 0
        try:
            saved, about = read_whole(self._path)
        except PredictorError:
            # A damaged file of an earlier crash costs its passes, not the fit.
            return 0
        passes, sums = about.get("passes"), self._sums.tensors()
        if about.get("of") != self._about or type(passes) is not int:
            return 0
        if any(name not in saved or saved[name].shape != tensor.shape for name, tensor in sums.items()):
            return 0
        for name, tensor in sums.items():
            tensor.copy_(saved[name])
        return passes

    def after_pass(self, num_passes: int) -> None:
        """Save if the interval has passed."""
        if self._clock() - self._saved_at >= self._save_every_s:
            write_whole(self._path, self._sums.tensors(), {"of": self._about, "passes": num_passes})
            self._saved_at = self._clock()


def choose(missed_mass: Mapping[str, Sequence[float | None]]) -> list[str | None]:
    """Choose per layer the name with the least missed gate mass; the first of equals, None where all are None.

    Args:
        missed_mass: by name, per layer; None where that predictor gives no guess. All of one length.
    """
    choice: list[str | None] = []
    for at in range(len(next(iter(missed_mass.values())))):
        known = {name: value for name, layers in missed_mass.items() if (value := layers[at]) is not None}
        choice.append(min(known, key=known.__getitem__) if known else None)
    return choice
