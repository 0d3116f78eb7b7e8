"""The maths of one decode step: experts computed as they arrive, outputs added up in ascending expert id."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from foreroute.kernels.cpu import ExpertMath, Operands, compute_several, rows_are_aligned

# An expert's key -> its operands, while it is leased.
OperandsOf = Callable[[int], Operands]


class Workspace(Protocol):
    """One token through several experts, which come in any order: kernels/cpu.py, and kernels/quant.py."""

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
        self._hidden = hidden
        self._routed = routed
        self._weights = weights
        self._most_at_once = most_at_once
        # What was run or stood in for, in order of arrival: outputs [rows of the expert, hidden].
        self._outputs: dict[int, torch.Tensor] = {}
        # A place is a token's position in the top-k, counted through all tokens.
        self._top_k = top_k = len(routed[0])
        self._places: dict[int, list[int]] = {}
        for position in range(top_k):
            place = position
            for row in routed:
                key = row[position]
                if key in self._places:
                    self._places[key].append(place)
                elif key >= 0:
                    self._places[key] = [place]
                place += top_k

    def run(self, keys: Sequence[int]) -> None:
        """Compute these experts for their rows."""
        at_once = self._most_at_once or len(keys)
        for first in range(0, len(keys), at_once):
            some = keys[first : first + at_once]
            operands = [self._operands_of(key) for key in some]
            self._outputs.update(zip(some, compute_several(self._math, self._rows(some), operands), strict=True))

    def stand_in(self, keys: Sequence[int], vectors: torch.Tensor) -> None:
        """Take `vectors` [keys, hidden] for the outputs of these experts, for every token routed to them."""
        for key, vector in zip(keys, vectors, strict=True):
            self._outputs[key] = vector.expand(len(self._places[key]), -1)

    def _rows(self, keys: Sequence[int]) -> Sequence[torch.Tensor]:
        """Of each expert the rows of `hidden` that are routed to it."""
        top_k, hidden = self._top_k, self._hidden
        tokens = torch.tensor([place // top_k for key in keys for place in self._places[key]], device=hidden.device)
        sizes = [len(self._places[key]) for key in keys]
        if rows_are_aligned(hidden):
            return hidden.index_select(0, tokens).split(sizes)
        return [hidden.index_select(0, some) for some in tokens.split(sizes)]

    def total(self) -> torch.Tensor:
        """The weighted sum [tokens, hidden]."""
        total = torch.zeros_like(self._hidden)
        if not self._outputs:
            return total
        rounds = self._rounds()
        device, top_k = total.device, self._top_k
        out = torch.cat(list(self._outputs.values()))
        rows, places = torch.tensor([add for adds in rounds for add in adds], device=device).unbind(1)
        weighted = out.index_select(0, rows) * self._weights.flatten().index_select(0, places).unsqueeze(1)
        everybody = list(range(len(total)))
        for adds, outputs in zip(rounds, weighted.to(total.dtype).split([len(adds) for adds in rounds]), strict=True):
            tokens = [place // top_k for _, place in adds]
            if tokens == everybody:
                total.add_(outputs)
            else:
                total.index_add_(0, torch.tensor(tokens, device=device), outputs)
        return total

    def _rounds(self) -> list[list[tuple[int, int]]]:
        """What is added to the total at once, one round after the other: (row among all outputs, place).

        As eager does, sums are rounded to the activation dtype after each expert, in ascending order. Each token has its
        own order, so that the first experts of all tokens are one round, whichever they are, and then the second ones.
        An expert that a token names twice is added in one call with both rows, which rounds once: then it is one round
        for each expert.
        """
        first_row, row = {}, 0
        for key in self._outputs:
            first_row[key] = row
            row += len(self._places[key])
        of_experts = [list(enumerate(self._places[key], first_row[key])) for key in sorted(self._outputs)]
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
