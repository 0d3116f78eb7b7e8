"""Fit a model's predictors from any text, in one pass: sums over most windows, then a choice on those held out."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from foreroute.calibrate.corpus import Corpus
from foreroute.calibrate.score import Progress, Scorer, guessers_of, run_passes
from foreroute.calibrate.sums import Sums
from foreroute.calibrate.watch import watching
from foreroute.engine import predictors as known
from foreroute.errors import PredictorError
from foreroute.predict.estimator import EstimatorSettings
from foreroute.predict.hybrid import choose
from foreroute.predict.sidecar import Sidecar, read_whole, write_whole


@dataclass(frozen=True)
class FitSettings:
    """What, besides the model and the text, decides the bytes of the result.

    rows: windows per forward pass. held_out_every: of so many windows one is held out. penalty: of the ridge, relative
    to each feature's variance. estimator: also train the paper's estimator, so; None for not.
    before_attention: also fit each layer's guess from before its own attention; `score` shows it, the engine does not
    use it.
    """

    rows: int = 8
    held_out_every: int = 8
    penalty: float = 1e-3
    estimator: EstimatorSettings | None = None
    before_attention: bool = False


def partial_path(path: Path) -> Path:
    """Where an unfinished fit keeps its sums."""
    return path.with_name(path.name + ".partial")


def fit(
    model: Any,
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

    A fit that was stopped goes on from where its sums were last saved, and ends with the same bytes. The number of
    torch threads is part of what must be the same: sums of another order differ in their last bits.

    Args:
        model: of `foreroute.load`. fingerprint: of its checkpoint.
        progress: called with (tokens done, all tokens) after each forward pass.
        save_every_s: how often the sums are saved, in seconds.
    Raises:
        PredictorError: a file cannot be written.
    Cost: a prefill of the text, and rows x features^2 multiply-adds per layer. Memory: see `Sums`.
    """
    settings = settings or FitSettings()
    train, held_out = corpus.split(settings.held_out_every)
    about = {
        "corpus": corpus.digest,
        "context": corpus.windows.shape[1],
        "settings": asdict(settings),
        "threads": torch.get_num_threads(),
    }
    sums = Sums(model, settings.estimator, num_tokens=train.numel(), before_attention=settings.before_attention)
    keeper = _Keeper(partial_path(path), sums, {**about, "fingerprint": fingerprint}, save_every_s, clock)
    num_resumed = keeper.resume() if resume else 0
    with watching(model, sums.on_moment, sums.on_rows) as watch:

        def run(windows: torch.Tensor, index: int) -> None:
            if index >= num_resumed:
                watch.run(windows, index)
                keeper.after_pass(index + 1)

        run_passes(run, train, settings.rows, lambda done, _: progress(done, corpus.num_tokens))
    sidecar = _solved(model, sums, fingerprint, settings)
    scorer = _scored(
        model, sidecar, held_out, settings.rows, lambda done, _: progress(train.numel() + done, corpus.num_tokens)
    )
    # Guesses that come at another time are no alternatives.
    of_next = [name for name in scorer.tallies if name not in (known.TOKEN_TABLE, known.ENTRY)]
    missed = {name: scorer.tallies[name].as_dict()["missed_mass"] for name in of_next}
    sidecar = replace(
        sidecar,
        # A layer's guess is of the layer after it.
        choice=[*choose({name: layers[1:] for name, layers in missed.items()}), None],
        about={
            **about,
            "tokens": {"fitted": train.numel(), "held_out": held_out.numel()},
            "held_out": {name: tally.as_dict() for name, tally in scorer.tallies.items()},
        },
    )
    sidecar.save(path)
    partial_path(path).unlink(missing_ok=True)
    return sidecar


def _solved(model: Any, sums: Sums, fingerprint: str, settings: FitSettings) -> Sidecar:
    """Predictors from sums; nothing chosen yet."""
    if sums.estimator is not None:
        sums.estimator.train()
    return Sidecar(
        fingerprint,
        ridge=[*(fit_of_layer.solve(settings.penalty) for fit_of_layer in sums.ridge), None],
        default_vectors=[outputs.means() if int(outputs.counts.sum()) else None for outputs in sums.outputs],
        token_table=sums.table.solve(sums.all_embeddings(), settings.penalty),
        popularity=sums.popularity,
        choice=[None] * len(sums.outputs),
        entry=[entry.solve(settings.penalty) for entry in sums.entry],
        estimator={} if sums.estimator is None else sums.estimator.weights,
    )


def _scored(model: Any, sidecar: Sidecar, held_out: torch.Tensor, rows: int, progress: Progress) -> Scorer:
    """Every predictor of the sidecar on the held-out windows."""
    candidates = known.fitted(model.foreroute.layers, model.dtype, sidecar)
    scorer = Scorer(guessers_of(candidates, sidecar), len(sidecar.choice))
    with watching(model, scorer.on_moment) as watch:
        run_passes(watch.run, held_out, rows, progress)
    return scorer


class _Keeper:
    """Saves the sums from time to time, and finds them again."""

    def __init__(
        self, path: Path, sums: Sums, about: dict[str, Any], save_every_s: float, clock: Callable[[], float]
    ) -> None:
        self._path = path
        self._sums = sums
        self._about = about
        self._save_every_s = save_every_s
        self._clock = clock
        self._saved_at = clock()

    def resume(self) -> int:
        """Take over saved sums of the same model, text and settings; returns the passes that they hold."""
        if not self._path.exists():
            return 0
        try:
            saved, about = read_whole(self._path)
        except PredictorError:
            # A damaged file of another crash costs its passes, not the fit.
            return 0
        if about.get("of") != self._about:
            return 0
        for name, tensor in self._sums.tensors().items():
            tensor.copy_(saved[name])
        return int(about["passes"])

    def after_pass(self, num_passes: int) -> None:
        """Save when it is time."""
        if self._clock() - self._saved_at >= self._save_every_s:
            write_whole(self._path, self._sums.tensors(), {"of": self._about, "passes": num_passes})
            self._saved_at = self._clock()
