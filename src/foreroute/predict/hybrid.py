"""Uses for each layer the predictor that was best on held-out tokens."""

from collections.abc import Mapping, Sequence

from foreroute.predict.base import Predictor, RouterSample, TokenGuess


class Hybrid:
    """Dispatches to one predictor per layer.

    Args:
        predictors: by name.
        choice: per MoE layer the name of the predictor of the next layer; None for no guess.
    """

    def __init__(self, predictors: Mapping[str, Predictor], choice: Sequence[str | None]) -> None:
        self._by_layer = [None if name is None else predictors[name] for name in choice]

    def guess(self, layer: int, seen: RouterSample, width: int) -> TokenGuess | None:
        """See `Predictor`. Cost: that of the layer's own predictor."""
        predictor = self._by_layer[layer] if layer < len(self._by_layer) else None
        return None if predictor is None else predictor.guess(layer, seen, width)


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
