"""Score each predictor of a model on a text, beside the controls, and measure what a guess costs."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from foreroute.loading.offloaded_model import OffloadedModel, handle_of
from foreroute.model.blocks import first_decoded
from foreroute.predict import build as known
from foreroute.predict.base import Predictor, RouterSample
from foreroute.predict.sidecar import Sidecar
from foreroute.prepare.controls import (
    Guesser,
    Moment,
    Popularity,
    first_only,
    of_predictor,
    oracle,
    previous_token,
    shuffled,
    uniform,
)
from foreroute.prepare.scoring import LayerTallies, widths_of
from foreroute.prepare.watch import watching
from foreroute.types import Progress

_COST_REPEATS = 30


@dataclass(frozen=True)
class Scores:
    """Results of `score`.

    tallies: by predictor or control. cost_us: by predictor, microseconds per token over all layers, for one token.
    """

    top_k: int
    num_tokens: int
    tallies: dict[str, LayerTallies]
    cost_us: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The scores as plain numbers, for --json."""
        return {
            "k": self.top_k,
            "tokens": self.num_tokens,
            "predictors": {
                name: {**tally.as_dict(), "cost_us": self.cost_us.get(name)} for name, tally in self.tallies.items()
            },
        }


class Scorer:
    """Runs guessers at every moment and tallies their scores."""

    def __init__(self, guessers: Mapping[str, Guesser], num_layers: int, first: int = 0) -> None:
        self._guessers = guessers
        self.tallies = {name: LayerTallies.of(num_layers, first) for name in guessers}

    def on_moment(self, moment: Moment, logits: torch.Tensor | None) -> None:
        """Score every guesser on `moment`'s tokens; the gate `logits` [tokens, experts] are not used."""
        width = widths_of(moment.now.ids.shape[1])[-1]
        for name, guesser in self._guessers.items():
            guess = guesser(moment, width)
            if guess is not None:
                self.tallies[name].layers[moment.layer].add(guess, moment.now, moment.num_experts)


def score(
    model: OffloadedModel,
    windows: torch.Tensor,
    sidecar: Sidecar | None,
    *,
    rows: int,
    progress: Progress = lambda done, total: None,
) -> Scores:
    """Score every predictor of the model and of `sidecar`, and every control.

    Args:
        model: of `foreroute.load`. windows: [windows, context] token ids that nothing was fitted to.
        rows: windows per forward pass. progress: called with (tokens done, all tokens).
    Raises:
        RefusedError: not a model of `load`.
    """
    layers = handle_of(model).layers
    popularity = Popularity(
        [torch.zeros(layer.experts.num_offloaded, dtype=torch.int64) for layer in layers]
        if sidecar is None
        else sidecar.popularity
    )
    candidates = candidates_of(model, sidecar)
    guessers = guessers_of(candidates, sidecar, model)
    # The predictor that the engine would use.
    main = guessers[list(candidates)[-1]]
    guessers |= {
        "oracle": oracle([known.own_router(layer) for layer in layers]),
        "shuffled": shuffled(main),
        "previous token": previous_token(popularity),
        "popularity": popularity,
        "random": uniform(),
    }
    scorer = Scorer(guessers, len(layers), first_decoded(layers))
    last: dict[int, RouterSample] = {}

    def on_moment(moment: Moment, logits: torch.Tensor | None) -> None:
        scorer.on_moment(moment, logits)
        popularity.learn(moment)
        last[moment.layer] = moment.now.first_token()

    with watching(model, on_moment) as watch:
        run_passes(watch.run, windows, rows, progress)
    costs = {name: cost_us(predictor, last, layers) for name, predictor in candidates.items()}
    tallies = {name: tally for name, tally in scorer.tallies.items() if any(t.tokens for t in tally.layers)}
    return Scores(layers[-1].top_k, windows.numel(), tallies, costs)


def candidates_of(model: OffloadedModel, sidecar: Sidecar | None) -> dict[str, Predictor]:
    """Predictors of the model and of `sidecar` by name, the one that the engine uses last."""
    layers, dtype = model.foreroute.layers, model.dtype
    if sidecar is None:
        return {known.LOOKAHEAD: known.lookahead(layers, dtype)}
    return {**known.fitted(layers, dtype, sidecar), known.HYBRID: known.hybrid(layers, dtype, sidecar)}


def guessers_of(
    candidates: Mapping[str, Predictor], sidecar: Sidecar | None, model: OffloadedModel
) -> dict[str, Guesser]:
    """Wrap `candidates` as guessers by name. `sidecar`'s token table, read as `model`'s router chooses, is one too, and
    predicts a decode step's first layer for the hybrid, as in the engine."""
    layers = model.foreroute.layers
    at = min(first_decoded(layers), len(layers) - 1)
    guessers = {name: of_predictor(predictor) for name, predictor in candidates.items()}
    if sidecar is not None and sidecar.token_table is not None:
        first = guessers[known.TOKEN_TABLE] = first_only(
            sidecar.token_table, known.selections(layers[at : at + 1], model.dtype)[0], at
        )
        if known.HYBRID in candidates:
            guessers[known.HYBRID] = of_predictor(candidates[known.HYBRID], first)
    return guessers


def run_passes(run: Callable[[torch.Tensor, int], None], windows: torch.Tensor, rows: int, progress: Progress) -> None:
    """Call `run` on all `windows` [windows, context], `rows` at a time; `progress` after each call."""
    for index, start in enumerate(range(0, len(windows), rows)):
        run(windows[start : start + rows], index)
        progress(min(start + rows, len(windows)) * windows.shape[1], windows.numel())


def cost_us(predictor: Predictor, last: Mapping[int, RouterSample], layers: Any) -> float:
    """Microseconds of `predictor`'s guesses for one token over all `layers`, on the samples `last`: sum of medians."""
    total = 0.0
    for layer in range(first_decoded(layers), len(layers) - 1):
        seen, width = last[layer], layers[layer + 1].top_k
        times = []
        for _ in range(_COST_REPEATS):
            started = time.perf_counter()
            with torch.no_grad():
                predictor.guess(layer, seen, width)
            times.append(time.perf_counter() - started)
        total += median(times)
    return total * 1e6
