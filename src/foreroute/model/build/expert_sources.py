"""Which stored tensors make each of an expert's, from what transformers' renaming collected for the model's tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from foreroute.checkpoint.assembly import Operation
from foreroute.checkpoint.layouts import PartSource
from foreroute.errors import UnsupportedModelError
from foreroute.model.adapters.registry import FoundExperts
from foreroute.model.experts import ExpertParameter


@dataclass(frozen=True)
class Collected:
    """What is stored for one of the model's tensors: names by matched pattern, and transformers' converter, if any."""

    by_pattern: Mapping[str | None, Sequence[str]]
    converter: Any


def expert_sources(
    found: Sequence[FoundExperts], collected: Mapping[str, Collected], state: Mapping[str, torch.Tensor]
) -> dict[tuple[str, str], PartSource]:
    """The sources of every expert parameter, by (module, parameter); of those that are stored.

    Args:
        collected: by the model's tensor. state: the model's tensors, on the meta device.
    Raises:
        UnsupportedModelError: a tensor is made of stored ones in an unknown way.
    """
    return {
        (one.name, parameter.name): _source_of(one, parameter, collected, state)
        for one in found
        for parameter in one.parameters
        if all(name in collected for group in one.tensors(parameter) for name in group)
    }


def _source_of(
    found: FoundExperts,
    parameter: ExpertParameter,
    collected: Mapping[str, Collected],
    state: Mapping[str, torch.Tensor],
) -> PartSource:
    groups = found.tensors(parameter)
    first = state[groups[0][0]]
    has_all_experts = len(groups[0]) == 1
    if has_all_experts and first.ndim > len(parameter.shape) and len(groups) == 1:
        source = _source(parameter.name, parameter.shape, collected[groups[0][0]])
        return replace(source, most_stored=parameter.most_stored)
    stored = tuple(tuple(_only(name, collected[name]) for name in group) for group in groups)
    has_rows = has_all_experts and first.ndim == len(parameter.shape)
    rows_of_each = first.shape[0] // found.num_experts if has_rows else 0
    return PartSource(parameter.name, parameter.shape, stored, parameter.operations, rows_of_each=rows_of_each)


def _only(name: str, collected: Collected) -> str:
    """The stored name of a tensor that is stored as it is."""
    stored = [one for names in collected.by_pattern.values() for one in names]
    if collected.converter is not None or len(stored) != 1:
        raise UnsupportedModelError(f"{name} is stored in several tensors: not known. Please report the model.")
    return stored[0]


def _source(part: str, shape: tuple[int, ...], collected: Collected) -> PartSource:
    """The source of an expert parameter that one tensor of the model holds."""
    by_pattern, converter = collected.by_pattern, collected.converter
    if converter is None:
        ordered, steps = list(by_pattern.values()), []
    else:
        ordered = [by_pattern.get(pattern, []) for pattern in converter.source_patterns]
        steps = [_operation(op, converter) for op in converter.operations]
    return PartSource(part, shape, tuple(tuple(names) for names in ordered), tuple(steps))


def _operation(op: Any, converter: Any) -> Operation:
    kind = type(op).__name__
    if len(converter.target_patterns) != 1:
        raise UnsupportedModelError(
            f"The checkpoint's experts are split over several parameters by transformers' {kind}: not known. "
            "Please report the model."
        )
    if kind == "Transpose":
        return Operation(kind, op.dim0, op.dim1, check_dims=getattr(op, "check_dims", False))
    return Operation(kind, getattr(op, "dim", 0), inverse=getattr(op, "inverse", False))
