"""Compute a MoE layer by torch, bit for bit as transformers' eager experts.

For few tokens experts are computed as they arrive, and their outputs are summed in ascending expert id.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from foreroute.kernels.layer import ExpertListener, ExpertSlots, LayerSum, Placed
from foreroute.kernels.slot_views import SlotViews
from foreroute.kernels.torch.experts import (
    ExpertMath,
    OneToken,
    Operands,
    compute_rows_apart,
    compute_several,
    rows_are_aligned,
)

# The family's own forward: (expert key -> operands, called in ascending order; hidden, ids, weights) -> the sum.
FamilyForward = Callable[[Callable[[int], Operands], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# A slot -> the operands of its expert.
OperandsOf = Callable[[int], Operands]


def group_by_expert(
    ids: torch.Tensor, keys: Sequence[int], base: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield, for each of `keys` (ascending), the tokens routed to it and their positions in the top-k.

    Sorted by position and then token, as transformers' eager experts order them: the order of rows in a product can
    change its bits.

    Args:
        ids: [tokens, k] int64. base: the key of the layer's expert 0.
    """
    num_tokens = ids.shape[0]
    flat = ids.t().reshape(-1)
    order = torch.argsort(flat, stable=True)
    sorted_ids = flat[order]
    wanted = torch.tensor([key - base for key in keys], device=ids.device)
    starts = torch.searchsorted(sorted_ids, wanted).tolist()
    ends = torch.searchsorted(sorted_ids, wanted, right=True).tolist()
    for key, start, end in zip(keys, starts, ends, strict=True):
        rows = order[start:end]
        yield key, rows % num_tokens, rows // num_tokens


class TorchLayer:
    """Computes one MoE layer's experts by torch: see `LayerKernels`.

    Args:
        layer: its index among the MoE layers. base: the key of its expert 0.
        views: the slots as tensors, shared by all layers.
        math: computes one expert; None where ours is not proven equal to the family's.
        workspace: for one token, shared by layers of one shape; None where `math` is.
        family_forward: computes the layer where `math` is None.

    Attributes:
        streams_only: the family's own forward computes this layer.
        rows_apart: whether the current step's rows are computed one by one, for the bits that each has alone.
    """

    num_held = 1

    def __init__(
        self,
        layer: int,
        base: int,
        views: SlotViews,
        math: ExpertMath | None,
        workspace: OneToken | None,
        family_forward: FamilyForward,
    ) -> None:
        self.views = views
        self.rows_apart: Callable[[], bool] = lambda: False
        self.streams_only = math is None
        self._layer = layer
        self._base = base
        self._math = math
        self._family_forward = family_forward

        def operands_of(slot: int) -> Operands:
            return views.operands(layer, slot)

        self._operands = operands_of
        self._token = None if math is None or workspace is None else TokenSum(workspace, math, operands_of)

    def begin(self, hidden: torch.Tensor, routed: Sequence[Sequence[int]], weights: torch.Tensor) -> LayerSum:
        """See `LayerKernels`. hidden: [tokens, hidden]. weights: [tokens, k]."""
        assert self._math is not None, "a layer without maths of ours is streamed"
        if len(routed) == 1 and self._token is not None and is_distinct(routed[0]):
            return self._token.begin(hidden, routed[0], weights)
        most = self.views.most_at_once(self._layer)
        rows_apart = self.rows_apart() and not self._math.computes_all_rows
        return RowsSum(self._math, self._operands, hidden, routed, weights, most, rows_apart=rows_apart)

    def stream(
        self,
        experts: ExpertSlots,
        keys: Sequence[int],
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        listener: ExpertListener | None = None,
    ) -> torch.Tensor:
        """See `LayerKernels`. hidden: [tokens, hidden]. ids, weights: [tokens, k]."""
        if self._math is None:
            return self._family_forward(lambda key: self._operands(experts.slot_of(key)), hidden, ids, weights)
        total, sums = torch.zeros_like(hidden), list[tuple[torch.Tensor, torch.Tensor]]()
        rows_apart = self.rows_apart()
        for key, tokens, positions in group_by_expert(ids, keys, self._base):
            operands = self._operands(experts.slot_of(key))
            if self._math.computes_all_rows:
                outputs = self._math(self._math.all_rows(hidden, tokens), operands)[tokens]
            elif rows_apart:
                outputs = torch.cat([self._math(hidden.index_select(0, one), operands) for one in tokens.split(1)])
            else:
                outputs = self._math(hidden[tokens], operands)
            if listener is not None:
                listener(self._layer, key - self._base, outputs)
            rows = self._math.weigh(outputs, weights[tokens, positions, None])
            sums.append((tokens, rows.to(total.dtype)))
            if not self._math.sums_at_once:
                total.index_add_(0, *sums.pop())
        return total.index_add_(0, *map(torch.cat, zip(*sums, strict=True))) if sums else total

    def close(self) -> None:
        """See `LayerKernels`."""
        self.views.clear()


def is_distinct(routed: Sequence[int]) -> bool:
    """Whether a token's keys are distinct (hash routing may repeat one); negative keys, no expert, may repeat.

    Families multiply a repeated expert's row twice in one product, and add both: a `RowsSum` does so too.
    """
    if len(set(routed)) == len(routed):
        return True
    experts = [key for key in routed if key >= 0]
    return len(set(experts)) == len(experts)


class TokenSum:
    """A `LayerSum` of one token with distinct experts: all but the products is one call for all experts together.

    Reused: `begin` starts the next token.
    """

    def __init__(self, workspace: OneToken, math: ExpertMath, operands_of: OperandsOf) -> None:
        self._workspace = workspace
        self._math = math
        self._operands_of = operands_of
        self._hidden = self._weights = torch.empty(0, dtype=torch.float32)

    def begin(self, hidden: torch.Tensor, routed: Sequence[int], weights: torch.Tensor) -> "TokenSum":
        """Begin the next token: `hidden` [1, hidden], `routed` keys by top-k position, gate `weights` [1, k]."""
        self._hidden = hidden
        self._weights = weights
        self._workspace.begin(routed)
        return self

    def add(self, experts: Sequence[Placed]) -> None:
        """Compute these experts for the token."""
        operands_of = self._operands_of
        self._workspace.run(
            self._math, self._hidden, [key for key, _ in experts], [operands_of(slot) for _, slot in experts]
        )

    def substitute(self, keys: Sequence[int], vectors: torch.Tensor) -> None:
        """Use `vectors` [keys, hidden] as the outputs of experts `keys`."""
        self._workspace.put(keys, vectors)

    def total(self) -> torch.Tensor:
        """Return the weighted sum [1, hidden]."""
        return self._workspace.total(self._weights)


class RowsSum:
    """A `LayerSum` of several tokens: a product per expert for its rows; all else is one call for many experts.

    Rows are ordered by position in the top-k and then by token, as eager experts order them: the order of rows in a
    product can change its bits.

    Args:
        hidden: [tokens, hidden]. weights: [tokens, k]. routed: per token its keys; negative ones are no expert.
        most_at_once: experts whose operands are held together; None: all of an `add`.
        rows_apart: compute an expert's rows one by one, for the bits that each has alone.
    """

    def __init__(
        self,
        math: ExpertMath,
        operands_of: OperandsOf,
        hidden: torch.Tensor,
        routed: Sequence[Sequence[int]],
        weights: torch.Tensor,
        most_at_once: int | None = None,
        *,
        rows_apart: bool = False,
    ) -> None:
        self._math = math
        self._operands_of = operands_of
        self._routed = routed
        self._weights = weights
        self._most_at_once = most_at_once
        self._rows_apart = rows_apart
        self._outputs: dict[int, torch.Tensor] = {}
        # Per expert its assignments: token * top_k + position in the token's top-k.
        self._top_k = top_k = len(routed[0])
        assignments: dict[int, list[int]] = {}
        for position in range(top_k):
            assignment = position
            for row in routed:
                key = row[position]
                if key in assignments:
                    assignments[key].append(assignment)
                elif key >= 0:
                    assignments[key] = [assignment]
                assignment += top_k
        self._assignments = assignments
        self._hidden = hidden
        self._rows = self._gathered()

    def add(self, experts: Sequence[Placed]) -> None:
        """Compute these experts for their rows."""
        at_once = self._most_at_once or len(experts)
        for first in range(0, len(experts), at_once):
            some = experts[first : first + at_once]
            keys = [key for key, _ in some]
            rows, operands = [self._rows[key] for key in keys], [self._operands_of(slot) for _, slot in some]
            if self._rows_apart:
                outputs = compute_rows_apart(self._math, rows, operands)
            else:
                outputs = compute_several(self._math, rows, operands)
            self._outputs.update(zip(keys, outputs, strict=True))
            if self._math.computes_all_rows:
                self._outputs.update({key: self._outputs[key].index_select(0, self._tokens_of(key)) for key in keys})

    def substitute(self, keys: Sequence[int], vectors: torch.Tensor) -> None:
        """Use `vectors` [keys, hidden] as the outputs of experts `keys`, for every token routed to them."""
        for key, vector in zip(keys, vectors, strict=True):
            self._outputs[key] = vector.expand(len(self._assignments[key]), -1)

    def total(self) -> torch.Tensor:
        """Return the weighted sum [tokens, hidden]."""
        hidden, top_k = self._hidden, self._top_k
        if not self._outputs:
            return torch.zeros_like(hidden)
        keys = sorted(self._outputs)
        passes = self._passes(keys)
        rows, assignments = torch.tensor([add for adds in passes for add in adds], device=hidden.device).unbind(1)
        outputs = torch.cat([self._outputs[key] for key in keys]).index_select(0, rows)
        weights = self._weights.reshape(-1, 1).index_select(0, assignments)
        weighted = self._math.weigh(outputs, weights).to(hidden.dtype)
        total = torch.zeros_like(hidden)
        num_tokens = len(hidden)
        for adds, some in zip(passes, weighted.split([len(adds) for adds in passes]), strict=True):
            if len(adds) == num_tokens and all(one // top_k == token for token, (_, one) in enumerate(adds)):
                total.add_(some)
            else:
                tokens = torch.tensor([one // top_k for _, one in adds], device=hidden.device)
                total.index_add_(0, tokens, some)
        return total

    def _gathered(self) -> dict[int, torch.Tensor]:
        """Gather for each expert the rows of `hidden` routed to it."""
        hidden, of_experts = self._hidden, self._assignments.values()
        if self._math.computes_all_rows:
            return {key: self._math.all_rows(hidden, self._tokens_of(key)) for key in self._assignments}
        tokens = [one // self._top_k for assignments in of_experts for one in assignments]
        index = torch.tensor(tokens, dtype=torch.int64, device=hidden.device)
        sizes = [len(assignments) for assignments in of_experts]
        if rows_are_aligned(hidden) or self._rows_apart:
            rows: Sequence[torch.Tensor] = hidden.index_select(0, index).split(sizes)
        else:
            rows = [hidden.index_select(0, some) for some in index.split(sizes)]
        return dict(zip(self._assignments, rows, strict=True))

    def _tokens_of(self, key: int) -> torch.Tensor:
        """The tokens routed to expert `key`."""
        return torch.tensor([one // self._top_k for one in self._assignments[key]], device=self._hidden.device)

    def _passes(self, keys: Sequence[int]) -> list[list[tuple[int, int]]]:
        """Split the sum into accumulation passes, one addition each, of (row of the outputs of `keys`, assignment).

        As eager does, sums are rounded to the activation dtype after each expert, in ascending order. A token's bits
        depend on its own experts only, so the first experts of all tokens are one pass, then the second ones, and so
        on. Eager adds a repeated expert's rows in one call, which rounds once: then each expert is a pass. Where it
        adds all experts in one call there is one pass.
        """
        of_experts: list[list[tuple[int, int]]] = []
        row = 0
        for key in keys:
            of_experts.append(list(enumerate(self._assignments[key], row)))
            row += len(of_experts[-1])
        if self._math.sums_at_once:
            return [[add for adds in of_experts for add in adds]]
        if not all(is_distinct(row) for row in self._routed):
            return of_experts
        of_tokens: list[list[tuple[int, int]]] = [[] for _ in self._routed]
        for adds in of_experts:
            for add in adds:
                of_tokens[add[1] // self._top_k].append(add)
        passes: list[list[tuple[int, int]]] = [[] for _ in range(max(map(len, of_tokens)))]
        for adds in of_tokens:
            for at, add in enumerate(adds):
                passes[at].append(add)
        return passes
