"""What the engine prefetches: more where guesses are poor, nothing of little weight once no token waits."""

import torch

from foreroute.predict.base import RouterSample, TokenGuess
from foreroute.predict.prefetch import PrefetchGuesses

EXPERTS = 10


class Fixed:
    """Guesses the same ids, best first, with the same weights."""

    ids = torch.tensor([[4, 7, 1, 0, 9, 2]])
    weights = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.03, 0.01]])

    def guess(self, layer: int, seen: RouterSample, width: int) -> TokenGuess:
        return TokenGuess(
            self.ids[:, :width].repeat(len(seen.ids), 1), self.weights[:, :width].repeat(len(seen.ids), 1)
        )


def guesses(without_waiting: bool) -> PrefetchGuesses:
    made = PrefetchGuesses(Fixed(), [EXPERTS] * 3, [2, 2, 2], widths_without_waiting=[4, 6, 2])
    made.without_waiting = without_waiting
    return made


def asked(made: PrefetchGuesses, layer: int, tokens: int = 1) -> list[int]:
    return list(made.guess(layer, torch.zeros(tokens, 3), torch.zeros(tokens, 2).long(), torch.zeros(tokens, 2)))


def test_exact_decoding_fetches_the_top_k() -> None:
    assert asked(guesses(False), 0) == [4, 7]
    assert asked(guesses(False), 1) == [4, 7]


def test_without_waiting_poor_layers_are_guessed_wider_and_light_guesses_left_out() -> None:
    # Six are guessed of layer 1, and two of them weigh less than a twentieth.
    assert asked(guesses(True), 0) == [4, 7, 1, 0]
    assert asked(guesses(True), 1) == [4, 7]
    assert asked(guesses(True), 0, tokens=3) == [4, 7, 1, 0]
