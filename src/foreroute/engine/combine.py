"""The maths of one decode step: experts computed as they arrive, outputs added up in ascending expert id."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from foreroute.kernels.torch.experts import ExpertMath, Operands, compute_several, rows_are_aligned

# An expert's key -> its operands, while it is leased.
OperandsOf = Callable[[int], Operands]


class Workspace(Protocol):
    """One token through several experts, in any order: kernels/torch/experts.py and quant.py."""

    def begin(self, routed: Sequence[int]) -> None:
        """A new token's step, with the key at each place of its top-k."""
        ...

    def run(self, math: Any, hidden: torch.Tensor, keys: Sequence[int], operands: Sequence[Operands]) -> None:
        """Compute the experts `keys` for `hidden` [1, hidden]."""
        ...

    def put(self, keys: Sequence[int], rows: torch.Tensor) -> None:
        """Take `rows` [keys, hidden] for the outputs of these experts, before their gate weights."""
        ...

    def total(self, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum [1, hidden], for gate weights [1, k]."""
        ...


class DecodeStep(Protocol):
    """One MoE layer's experts for one step: `run` or `stand_in` in any order and any grouping, then `total` once."""

    def run(self, keys: Sequence[int]) -> None:
        """Compute these experts for the tokens routed to them."""
        ...

    def stand_in(self, keys: Sequence[int], vectors: torch.Tensor) -> None:
        """Take `vectors` [keys, hidden] for the outputs of these experts, for every token routed to them."""
        ...

    def total(self) -> torch.Tensor:
        """The weighted sum [tokens, hidden], accumulated in ascending key, as transformers' eager experts do."""
        ...


def is_distinct(routed: Sequence[int]) -> bool:
    """A token names no expert twice, as a hash table may; negative keys, which are no expert, may come again.

    Families multiply such a token's row twice in one product, and add both: a `RowsStep` does so too.
    """
    if len(set(routed)) == len(routed):
        return True
    experts = [key for key in routed if key >= 0]
    return len(set(experts)) == len(experts)


class TokenStep:
    """One token that names no expert twice: everything but the products is one call for all experts together."""

    def __init__(
        self,
        workspace: Workspace,
        math: ExpertMath,
        operands_of: OperandsOf,
        hidden: torch.Tensor,
        routed: Sequence[int],
        weights: torch.Tensor,
    ) -> None:
        self._workspace = workspace
        self._math = math
        self._operands_of = operands_of
        self._hidden = hidden
        self._weights = weights
        workspace.begin(routed)

    def run(self, keys: Sequence[int]) -> None:
        """Compute these experts for the token."""
        self._workspace.run(self._math, self._hidden, keys, [self._operands_of(key) for key in keys])

    def stand_in(self, keys: Sequence[int], vectors: torch.Tensor) -> None:
        """Take `vectors` [keys, hidden] for the outputs of these experts."""
        self._workspace.put(keys, vectors)

    def total(self) -> torch.Tensor:
        """The weighted sum [1, hidden]."""
        return self._workspace.total(self._weights)


class RowsStep:
    """Several tokens: each expert takes the rows routed to it, and what is no product is one call for many experts.

    Rows are ordered by position in the top-k and then by token, as eager experts order them: the order of rows in a
    product can change its bits.

    Args:
        routed: per token its keys; negative ones are no expert.
        most_at_once: experts whose operands are asked for together; None for as many as a `run` has.
    """

    def __init__(
        self,
        math: ExpertMath,
        operands_of: OperandsOf,
        hidden: torch.Tensor,
        routed: Sequence[Sequence[int]],
        weights: torch.Tensor,
        most_at_once: int | None = None,
    ) -> None:
        self._math = math
        self._operands_of = operands_of
        self._routed = routed
        self._weights = weights
        self._most_at_once = most_at_once
        self._outputs: dict[int, torch.Tensor] = {}
        # Per expert its places. A place is a token's position in the top-k, counted through all tokens.
        self._top_k = top_k = len(routed[0])
        places: dict[int, list[int]] = {}
        for position in range(top_k):
            place = position
            for row in routed:
                key = row[position]
                if key in places:
                    places[key].append(place)
                elif key >= 0:
                    places[key] = [place]
                place += top_k
        self._places = places
        self._hidden = hidden
        self._rows = self._gathered()

    def run(self, keys: Sequence[int]) -> None:
        """Compute these experts for their rows."""
        at_once = self._most_at_once or len(keys)
        for first in range(0, len(keys), at_once):
            some = keys[first : first + at_once]
            rows, operands = [self._rows[key] for key in some], [self._operands_of(key) for key in some]
            self._outputs.update(zip(some, compute_several(self._math, rows, operands), strict=True))

    def stand_in(self, keys: Sequence[int], vectors: torch.Tensor) -> None:
        """Take `vectors` [keys, hidden] for the outputs of these experts, for every token routed to them."""
        for key, vector in zip(keys, vectors, strict=True):
            self._outputs[key] = vector.expand(len(self._places[key]), -1)

    def total(self) -> torch.Tensor:
        """The weighted sum [tokens, hidden]."""
        hidden, top_k = self._hidden, self._top_k
        if not self._outputs:
            return torch.zeros_like(hidden)
        keys = sorted(self._outputs)
        rounds = self._rounds(keys)
        rows, places = torch.tensor([add for adds in rounds for add in adds], device=hidden.device).unbind(1)
        outputs = torch.cat([self._outputs[key] for key in keys]).index_select(0, rows)
        weighted = (outputs * self._weights.reshape(-1, 1).index_select(0, places)).to(hidden.dtype)
        total = torch.zeros_like(hidden)
        num_tokens = len(hidden)
        for adds, some in zip(rounds, weighted.split([len(adds) for adds in rounds]), strict=True):
            if len(adds) == num_tokens and all(place // top_k == token for token, (_, place) in enumerate(adds)):
                total.add_(some)
            else:
                tokens = torch.tensor([place // top_k for _, place in adds], device=hidden.device)
                total.index_add_(0, tokens, some)
        return total

    def _gathered(self) -> dict[int, torch.Tensor]:
        """For each expert the rows of `hidden` that are routed to it."""
        hidden, every_place = self._hidden, self._places.values()
        tokens = [place // self._top_k for places in every_place for place in places]
        index = torch.tensor(tokens, dtype=torch.int64, device=hidden.device)
        sizes = [len(places) for places in every_place]
        if rows_are_aligned(hidden):
            rows: Sequence[torch.Tensor] = hidden.index_select(0, index).split(sizes)
        else:
            rows = [hidden.index_select(0, some) for some in index.split(sizes)]
        return dict(zip(self._places, rows, strict=True))

    def _rounds(self, keys: Sequence[int]) -> list[list[tuple[int, int]]]:
        """What is added to the total at once, one round after the other: (row among the outputs of `keys`, place).

        As eager does, sums are rounded to the activation dtype after each expert, in ascending order. Only a token's
        own experts matter to it, so that the first ones of all tokens are one round, whichever they are, and then the
        second ones. What a token names twice eager adds in one call, which rounds once: then each expert is a round.
        """
        of_experts: list[list[tuple[int, int]]] = []
        row = 0
        for key in keys:
            of_experts.append(list(enumerate(self._places[key], row)))
            row += len(of_experts[-1])
        if not all(is_distinct(row) for row in self._routed):
            return of_experts
        of_tokens: list[list[tuple[int, int]]] = [[] for _ in self._routed]
        for adds in of_experts:
            for add in adds:
                of_tokens[add[1] // self._top_k].append(add)
        rounds: list[list[tuple[int, int]]] = [[] for _ in range(max(map(len, of_tokens)))]
        for adds in of_tokens:
            for at, add in enumerate(adds):
                rounds[at].append(add)
        return rounds
