"""Guess the next layer's experts by running its router early, on what this layer's router reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NextRouter:
    """The router of the MoE layer that follows, ready to be run ahead.

    route: router input [tokens, hidden] -> the router's outputs.
    ids_at: position of the expert ids [tokens, k] among them. logits_at: of the gate logits [tokens, >= E], or -1.
    scale: [hidden] by which this layer's router input is multiplied to become what the next norm would have made of
        the same residual: the next norm's weight over this one's. None where the norms are not known.
    """

    route: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    ids_at: int
    logits_at: int
    num_experts: int
    scale: torch.Tensor | None


class RouterLookahead:
    """The next router on this layer's router input (arXiv 2603.19289, without its default vectors).

    Args:
        following: per MoE layer, the router of the next one; None where it cannot be run ahead.
        width: experts guessed per token; the router's own top-k when None.
    """

    def __init__(self, following: Sequence[NextRouter | None], width: int | None = None) -> None:
        self._following = list(following)
        self._width = width

    def guess(self, layer: int, router_input: torch.Tensor) -> Sequence[int]:
        """Expert indices of MoE layer `layer + 1`, best first; over several tokens, the most wanted first.

        Args:
            router_input: [tokens, hidden].
        Cost: one [tokens, hidden] x [hidden, experts] product and one read-back.
        """
        following = self._following[layer]
        if following is None:
            return ()
        ahead = router_input if following.scale is None else router_input * following.scale
        outputs = following.route(ahead)
        rows = outputs[following.ids_at].tolist()
        if self._width is not None:
            rows = [self._resized(row, outputs, following, token) for token, row in enumerate(rows)]
        if len(rows) == 1:
            return [expert for expert in rows[0] if expert < following.num_experts]
        votes: dict[int, int] = {}
        for row in rows:
            for rank, expert in enumerate(row):
                if expert < following.num_experts:
                    votes[expert] = votes.get(expert, 0) + len(row) - rank
        return sorted(votes, key=lambda expert: -votes[expert])

    def _resized(
        self, row: list[int], outputs: tuple[torch.Tensor, ...], following: NextRouter, token: int
    ) -> list[int]:
        """The router's own choice cut to the width, or lengthened by the next best logits."""
        assert self._width is not None
        if self._width <= len(row) or following.logits_at < 0:
            return row[: self._width]
        logits = outputs[following.logits_at][token, : following.num_experts]
        best = torch.topk(logits, min(self._width + len(row), following.num_experts)).indices.tolist()
        chosen = set(row)
        return (row + [expert for expert in best if expert not in chosen])[: self._width]
