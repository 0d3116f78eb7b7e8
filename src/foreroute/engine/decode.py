"""The maths of one decode step: experts computed as they arrive, outputs added up in ascending expert id."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from foreroute.kernels.cpu import ExpertMath, Operands

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
    """Several tokens: each expert takes the rows routed to it.

    Rows are ordered by position in the top-k and then by token, as eager experts order them: the order of rows in a
    product can change its bits.
    """

    def __init__(
        self,
        math: ExpertMath,
        operands_of: OperandsOf,
        hidden: torch.Tensor,
        routed: Sequence[Sequence[int]],
        weights: torch.Tensor,
    ) -> None:
        self._math = math
        self._operands_of = operands_of
        self._hidden = hidden
        self._weights = weights
        self._outputs: dict[int, torch.Tensor] = {}
        rows: dict[int, tuple[list[int], list[int]]] = {}
        for position in range(len(routed[0])):
            for token, row in enumerate(routed):
                tokens, positions = rows.setdefault(row[position], ([], []))
                tokens.append(token)
                positions.append(position)
        device = hidden.device
        self._rows = {
            key: (torch.tensor(tokens, device=device), torch.tensor(at, device=device))
            for key, (tokens, at) in rows.items()
        }

    def run(self, keys: Sequence[int]) -> None:
        """Compute these experts for their rows."""
        for key in keys:
            tokens, _ = self._rows[key]
            self._keep(key, self._math(self._hidden[tokens], self._operands_of(key)))

    def stand_in(self, keys: Sequence[int], vectors: torch.Tensor) -> None:
        """Take `vectors` [keys, hidden] for the outputs of these experts, for every token routed to them."""
        for key, vector in zip(keys, vectors, strict=True):
            self._keep(key, vector)

    def _keep(self, key: int, out: torch.Tensor) -> None:
        tokens, positions = self._rows[key]
        self._outputs[key] = (out * self._weights[tokens, positions, None]).to(self._hidden.dtype)

    def total(self) -> torch.Tensor:
        """The weighted sum [tokens, hidden]."""
        total = torch.zeros_like(self._hidden)
        for key in sorted(self._outputs):
            total.index_add_(0, self._rows[key][0], self._outputs[key])
        return total
