"""Where each stored tensor belongs: to an expert, or to no place in the model, which may be right or an error.

Names are mapped to a family's experts by transformers' own renaming. Of tensors without a place, three kinds are
ignored: those that transformers itself leaves unread for a family; layers that predict several tokens at once (MTP,
nextn), after the model's own; and scales of a quantised KV cache, which is not quantised here. transformers identifies
such layers by their number in the published model (61, 46, 92), which differs at another depth: here the model's own
depth decides. All other tensors are errors.
"""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from torch import nn

from foreroute.checkpoint.declared import is_whole
from foreroute.checkpoint.layouts import PartSource
from foreroute.errors import CheckpointError, CorruptCheckpointError
from foreroute.model.adapters.registry import FoundExperts, adapter_of
from foreroute.model.build.expert_sources import Collected, expert_sources
from foreroute.whole_files import read_object

_LOG = logging.getLogger(__name__)

_LAYER = re.compile(r"^(?P<stack>|.*?\.)layers\.(?P<number>\d+)\.")
# Modules, or parts of a layer, that only multi-token prediction has.
_PREDICTION = re.compile(r"(^|\.)(mtp|nextn)(_\w+)?\.")
_PREDICTION_PART = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head|(mtp|nextn)(_\w+)?)\.")
# Keys of config.json for the number of such layers.
_PREDICTION_KEYS = (
    "num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers", "num_mtp_modules",
)  # fmt: skip
_CACHE_SCALE = re.compile(
    r"\.((q|k|v|kv|qk|qkv|prob)_(scale|zero_point)|(q|k|v|qkv)_proj\.output_(scale|zero_point)|prob_output_scale)$"
)
# A pattern of transformers that selects one layer by its number.
_NUMBERED_LAYER = re.compile(r"layers\\?\.\d")


def map_sources(
    meta_model: nn.Module, found: Sequence[FoundExperts], stored_names: Collection[str]
) -> tuple[dict[tuple[str, str], PartSource], dict[str, tuple[str, ...]], dict[str, str]]:
    """Find the stored tensors of every expert parameter, by (module, parameter), as transformers collects them.

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
    targets = {name for one in found for name in one.all_tensors}
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
        elif target in targets:
            groups.setdefault(target, {}).setdefault(pattern, []).append(stored_name)
        elif pattern is None:
            placed[stored_name] = target
    collected = {name: Collected(stored, by_pattern.get(next(iter(stored)))) for name, stored in groups.items()}
    return expert_sources(found, collected, state), unplaced, placed


@dataclass(frozen=True)
class Ignored:
    """Stored tensors that are not read.

    names: as in the checkpoint; quantised matrices by the model's name. targets: the same by transformers' names.
    notes: a line about each kind, for users.
    """

    names: frozenset[str] = frozenset()
    targets: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


@dataclass
class _Depths:
    """Number of layers in each stack of layers, by the name before `layers.`."""

    of_stack: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Collection[str]) -> "_Depths":
        depths = cls()
        for stack, number in map(_layer_of, names):
            if number is not None:
                depths.of_stack[stack] = max(depths.of_stack.get(stack, 0), number + 1)
        return depths

    def find(self, stack: str) -> int | None:
        """The depth of a stack; its name may lack the model's prefix, or have one more."""
        if stack in self.of_stack:
            return self.of_stack[stack]
        found = {depth for known, depth in self.of_stack.items() if _is_end(stack, known) or _is_end(known, stack)}
        return found.pop() if len(found) == 1 else None


def sort_unplaced(
    folder: Path,
    model: nn.Module,
    unplaced: Mapping[str, tuple[str, ...]],
    *,
    is_quantised: bool,
) -> Ignored:
    """Check that every stored tensor without a place in the model can be ignored.

    Args:
        folder: of config.json. model: on the meta device. unplaced: by stored name, transformers' names for each.
        is_quantised: config.json declares a quantisation.
    Raises:
        CorruptCheckpointError: a tensor cannot; the first is named.
    """
    depths, patterns = _Depths.of(model.state_dict().keys()), tuple(_family_patterns(model))
    count = _declared_layers(folder)
    layers = {
        _layer_of(targets[0]) for targets in unplaced.values() if _PREDICTION_PART.search(targets[0])
    }  # parts that no other layer has
    prediction: list[str] = []
    scales: list[str] = []
    unknown: list[str] = []
    for name, (target, *_) in sorted(unplaced.items()):
        beyond = _beyond(depths, target)
        is_told = beyond is not None and (_layer_of(target) in layers or beyond < count)
        if is_told or _PREDICTION.search(target):
            prediction.append(name)
        elif is_quantised and _CACHE_SCALE.search(target):
            scales.append(name)
        elif not any(
            re.search(pattern, target) and (beyond is not None or not _NUMBERED_LAYER.search(pattern))
            for pattern in patterns
        ):
            unknown.append(name)
    if unknown:
        raise CorruptCheckpointError(
            f"{folder} holds {unknown[0]}, which the model has no place for ({len(unknown)} such tensors). "
            "config.json and the weights are of different models."
        )
    return Ignored(frozenset(unplaced), frozenset().union(*unplaced.values()), tuple(_notes(prediction, scales)))


def _beyond(depths: _Depths, target: str) -> int | None:
    """Layers between the end of its stack and the tensor's layer; None if it is not past the end."""
    stack, number = _layer_of(target)
    if number is None:
        return None
    beyond = number - (depths.find(stack) or number + 1)
    return beyond if beyond >= 0 else None


def tell(notes: Collection[str], folder: Path) -> None:
    """Log each of `notes` on `folder` in a line, as a warning; only once, however often the model is loaded."""
    for note in notes:
        _say(folder, note)


@lru_cache(maxsize=256)
def _say(folder: Path, note: str) -> None:
    _LOG.warning("%s: %s", folder, note)


def _notes(prediction: list[str], scales: list[str]) -> Iterator[str]:
    if prediction:
        yield f"Layers of multi-token prediction are left unread: one token is predicted at a time{_count(prediction)}."
    if scales:
        yield f"Scales of keys and values are left unread: they are not quantised here{_count(scales)}."


def _count(names: list[str]) -> str:
    return f" ({len(names)} tensors, first {names[0]})" if len(names) > 1 else f" ({names[0]})"


def _family_patterns(model: nn.Module) -> Iterator[str]:
    """Patterns that transformers leaves unread: the family's, and those of buffers that earlier versions stored."""
    yield from getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    for cls in {type(module) for module in model.modules()}:
        adapter = adapter_of(cls)
        yield from () if adapter is None else adapter.UNREAD
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        yield r"rotary_emb\.inv_freq"
    if any(name.endswith("position_ids") for name in buffers):
        yield r"(^|\.)position_ids$"


def _declared_layers(folder: Path) -> int:
    """Layers of multi-token prediction in config.json itself, without its class's defaults."""
    content = read_object(folder / "config.json", CheckpointError)
    inner = content.get("text_config")
    told = {**content, **(inner if isinstance(inner, dict) else {})}
    return max((told[key] for key in _PREDICTION_KEYS if is_whole(told.get(key))), default=0)


def _layer_of(name: str) -> tuple[str, int | None]:
    """The stack of layers of a tensor, by the name before `layers.`, and its layer number."""
    found = _LAYER.match(name)
    return (found["stack"], int(found["number"])) if found else ("", None)


def _is_end(short: str, long: str) -> bool:
    return short == "" or long.endswith(f".{short}")
