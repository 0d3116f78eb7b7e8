"""The maths of one expert on the CPU, bit for bit what transformers' eager experts do.

A family is described by the flags that transformers' decorator sets and by its own gating function. Two orders of
operations exist in the wild (a linear with bias, or a product and then a sum); which one a family follows is not
guessed but found out at load, by comparing bits with the family's own forward (engine/verify_math.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own convention

# One expert's tensors in the layout's order, already in the compute dtype.
Parts = Sequence[torch.Tensor]


@dataclass(frozen=True)
class ExpertMath:
    """How a family computes one expert.

    gate: [rows, gate_up] -> [rows, intermediate]; the family's own activation and gating.
    up_at, down_at, up_bias_at, down_bias_at: positions of the tensors among an expert's parts; -1 where absent.
    is_transposed: weights are [in, out] in place of [out, in].
    """

    gate: Callable[[torch.Tensor], torch.Tensor]
    up_at: int
    down_at: int
    up_bias_at: int = -1
    down_bias_at: int = -1
    is_transposed: bool = False

    def __call__(self, rows: torch.Tensor, parts: Parts) -> torch.Tensor:
        """The expert's output [rows, hidden] for `rows` [rows, hidden], before its gate weight."""
        inner = self.gate(self._project(rows, parts, self.up_at, self.up_bias_at))
        return self._project(inner, parts, self.down_at, self.down_bias_at)

    def _project(self, rows: torch.Tensor, parts: Parts, weight_at: int, bias_at: int) -> torch.Tensor:
        weight = parts[weight_at]
        product = rows @ weight if self.is_transposed else F.linear(rows, weight)
        return product if bias_at < 0 else product + parts[bias_at]
