"""Map names of stored tensors to a family's experts, by transformers' own renaming of each name."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from foreroute.checkpoint.assembly import Operation
from foreroute.checkpoint.layouts import PartSource
from foreroute.errors import UnsupportedModelError
from foreroute.model.experts import ExpertParameter


def num_experts(module: nn.Module) -> int:
    """Number of experts in an experts module."""
    return int(next(p for p in module._parameters.values() if p is not None and p.ndim >= 2).shape[0])


def expert_parameters(module: nn.Module) -> tuple[ExpertParameter, ...]:
    """The module's parameters that hold a part of every expert."""
    count = num_experts(module)
    return tuple(
        ExpertParameter(name, tuple(p.shape[1:]))
        for name, p in module._parameters.items()
        if p is not None and p.ndim >= 2 and p.shape[0] == count
    )


def map_sources(
    meta_model: nn.Module, modules: Mapping[str, nn.Module], stored_names: Collection[str]
) -> tuple[dict[str, PartSource], dict[str, tuple[str, ...]], dict[str, str]]:
    """Find the stored tensors of every expert parameter of `modules`, by its full name, as transformers collects them.

    Returns also the `stored_names` without a place in `meta_model`, with transformers' names for each; and the stored
    names that become a tensor of the model unchanged, with its name there.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(meta_model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = meta_model.state_dict(), meta_model.base_model_prefix
    shapes = {f"{name}.{p.name}": (p.name, p.shape) for name, m in modules.items() for p in expert_parameters(m)}
    groups: dict[str, dict[str | None, list[str]]] = {}
    unplaced: dict[str, tuple[str, ...]] = {}
    placed: dict[str, str] = {}
    for stored_name in sorted(stored_names, key=dot_natural_key):
        target, pattern = rename_source_key(stored_name, renamings, converters, prefix, state)
        if target not in state and stored_name in state:
            target, pattern = rename_source_key(stored_name, [], [], prefix, state)
        if target not in state:
            converted = [target] if pattern is None else by_pattern[pattern].target_patterns
            unplaced[stored_name] = tuple(target.replace(converted[0], one) for one in converted)
        elif target in shapes:
            groups.setdefault(target, {}).setdefault(pattern, []).append(stored_name)
        elif pattern is None:
            placed[stored_name] = target
    sources = {
        target: _source(*shapes[target], by_source, by_pattern.get(next(iter(by_source))))
        for target, by_source in groups.items()
    }
    return sources, unplaced, placed


def _source(
    part: str, shape: tuple[int, ...], by_pattern: Mapping[str | None, list[str]], converter: Any
) -> PartSource:
    """The source of an expert parameter, from stored names by matched pattern and transformers' converter."""
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
