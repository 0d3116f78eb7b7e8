"""Experts of the usual form: a first matrix, gate and up or up alone, an activation, and a second matrix."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from foreroute.checkpoint.assembly import Operation
from foreroute.model.experts import ExpertParameter

# The usual names of an expert's matrices, by which they are packed: of gate and up in one, up alone, and down.
GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"

Activation = Callable[[torch.Tensor], torch.Tensor]

# One matrix above the other; dimension 0 is that of the experts.
STACKED = Operation("Concatenate", 1)


def gated_by(activation: Activation, *, is_apart: bool = False) -> Activation:
    """`activation` of the first half of each row, times the second half.

    Args:
        is_apart: the halves are tensors of their own in the family: torch rounds otherwise across the ends of rows.
    """

    def gate(rows: torch.Tensor) -> torch.Tensor:
        first, second = rows.chunk(2, dim=-1)
        if is_apart:
            first, second = first.contiguous(), second.contiguous()
        return activation(first) * second

    return gate


def linear_expert(gate: Activation) -> Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]:
    """An expert of two matrices, each [out, in], with `gate` between them."""

    def expert(rows: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        first, second = parts
        return F.linear(gate(F.linear(rows, first)), second)

    return expert


def shape_of(block: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a parameter of `block` by its name, which may lead through children."""
    return tuple(block.get_parameter(name).shape)


def of_children(block: nn.Module, child: str, count: int, parts: Mapping[str, str]) -> tuple[ExpertParameter, ...]:
    """The parameters of experts that are a child module each.

    Args:
        child: the name of an expert's module in `block`, with {} for its number. count: experts.
        parts: by the parameter's name, that of its tensor in an expert's module.
    """
    return tuple(
        ExpertParameter(
            name,
            shape_of(block, f"{child.format(0)}.{tensor}"),
            (tuple(f"{child.format(at)}.{tensor}" for at in range(count)),),
        )
        for name, tensor in parts.items()
    )
