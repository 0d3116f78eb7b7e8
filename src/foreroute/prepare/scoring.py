"""Measure guesses: recall of single experts, of exact sets and of gate mass, summed per layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from foreroute.predict.base import RouterSample, TokenGuess

# Guess widths up from a layer's top-k: experts predicted per token, as (name, k -> width).
WIDTHS = ("k", "k2", "2k")


def widths_of(top_k: int) -> tuple[int, int, int]:
    """The guess widths to score: k, k + 2 and 2k."""
    return (top_k, top_k + 2, 2 * top_k)


@dataclass
class LayerTally:
    """Sums over the tokens of one layer. Lists are per width, in the order of WIDTHS.

    covered: routed experts in the guess. whole: tokens with all experts in it. mass: gate mass in it.
    """

    tokens: int = 0
    slots: int = 0
    total_mass: float = 0.0
    covered: list[int] = field(default_factory=lambda: [0] * len(WIDTHS))
    whole: list[int] = field(default_factory=lambda: [0] * len(WIDTHS))
    mass: list[float] = field(default_factory=lambda: [0.0] * len(WIDTHS))

    def add(self, guess: TokenGuess, truth: RouterSample, num_experts: int) -> None:
        """Compare a guess [tokens, width] with the routing `truth`; ids from `num_experts` up do not count."""
        is_expert = truth.ids < num_experts
        named = (guess.ids[:, :, None] == truth.ids[:, None, :]) & is_expert[:, None, :]
        weights = truth.weights.double() * is_expert
        self.tokens += len(truth.ids)
        self.slots += int(is_expert.sum())
        self.total_mass += float(weights.sum())
        for at, width in enumerate(widths_of(truth.ids.shape[-1])):
            found = named[:, :width].any(1)
            self.covered[at] += int(found.sum())
            self.whole[at] += int((found | ~is_expert).all(1).sum())
            self.mass[at] += float((weights * found).sum())

    def recall(self, width_at: int) -> float:
        """Share of the routed experts in the guess, 0 to 1."""
        return self.covered[width_at] / self.slots

    def exact_set(self, width_at: int) -> float:
        """Share of the tokens with all experts in the guess, 0 to 1."""
        return self.whole[width_at] / self.tokens

    def missed_mass(self, width_at: int = 0) -> float:
        """Share of the gate mass outside the guess, 0 to 1."""
        return 1.0 - self.mass[width_at] / self.total_mass


@dataclass
class LayerTallies:
    """One predictor's scores over all MoE layers. first: the first of a decode step."""

    layers: list[LayerTally]
    first: int = 0

    @classmethod
    def of(cls, num_layers: int, first: int = 0) -> "LayerTallies":
        """Empty tallies for `num_layers` layers, of which `first` is a decode step's first."""
        return cls([LayerTally() for _ in range(num_layers)], first)

    def as_dict(self) -> dict[str, Any]:
        """Per figure one number per layer (None where there was no guess), and its "mean" over those past `first`."""
        figures: dict[str, list[float | None]] = {}
        for at, width in enumerate(WIDTHS):
            figures[f"recall_{width}"] = [t.recall(at) if t.slots else None for t in self.layers]
            figures[f"exact_set_{width}"] = [t.exact_set(at) if t.tokens else None for t in self.layers]
            mass_name = "missed_mass" if at == 0 else f"missed_mass_{width}"
            figures[mass_name] = [t.missed_mass(at) if t.slots else None for t in self.layers]
        return {**figures, "mean": {name: mean_past_first(layers[self.first :]) for name, layers in figures.items()}}


def mean_past_first(layers: Sequence[float | None]) -> float | None:
    """The mean over layers 1 and up that have a number; None where none has."""
    known = [value for value in layers[1:] if value is not None]
    return sum(known) / len(known) if known else None
