"""What the step below asks of the parts that it is given: who guesses, who learns, who watches."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Predictor(Protocol):
    """Guesses the experts of the MoE layer after `layer` from what crosses the seam there."""

    def guess(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Sequence[int]:
        """Expert indices of MoE layer `layer + 1`, distinct, best first; empty when there is nothing to say.

        hidden: [tokens, hidden], the router's input. ids, weights: [tokens, k], its answer.
        """
        ...

    def guess_first(self, token_ids: torch.Tensor) -> Sequence[int]:
        """Expert indices of MoE layer 0 for the step's `token_ids` [tokens], as above."""
        ...

    def see_first(self, hidden: torch.Tensor, num_rows: int) -> None:
        """The router input of MoE layer 0, [rows x positions, hidden], of every step."""
        ...


class Learner(Protocol):
    """Improves guesses with what passes by, in time that would be lost."""

    def see(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """A layer's routing is known."""
        ...

    def work(self) -> bool:
        """Do a little; False when there is nothing to do."""
        ...

    def pause(self) -> None:
        """Guesses are switched off: learn nothing until `resume`."""
        ...

    def resume(self) -> None:
        """Guesses are wanted again; nothing happens where they were not switched off."""
        ...

    def close(self) -> None:
        """No more of it."""
        ...


# Called at the start of a layer's step, with (layer, hidden, ids, weights).
Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
# Called with (layer, expert, its outputs [rows, hidden] before gate weights), for experts that are streamed.
ExpertListener = Callable[[int, int, torch.Tensor], None]
