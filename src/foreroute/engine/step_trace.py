"""An observer that writes the steps to a trace file; transfer/wrappers.py writes the lines of reads."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.config import EngineConfig, Plan
from foreroute.engine.interfaces import EngineStats, StepInfo, StepObserver
from foreroute.trace import VERSION, Trace
from foreroute.types import ExpertKeys

_WEIGHT_DIGITS = 4


def header_of(plan: Plan, asked: EngineConfig, table: ExpertTable, fingerprint: str) -> dict[str, Any]:
    """Return the fields of a trace's first line: the model (`fingerprint`, `table`), its `plan`, the `asked` config."""
    return {
        "version": VERSION,
        "model": plan.folder.rstrip("/").rsplit("/", 1)[-1],
        "model_type": plan.model_type,
        "fingerprint": fingerprint,
        "experts_per_layer": [layer.num_experts for layer in table.layers],
        "top_k": list(plan.top_k),
        "expert_bytes": [layer.expert_nbytes for layer in table.layers],
        "num_slots": plan.num_slots,
        "slot_bytes": plan.slot_bytes,
        "layer_slot_bytes": list(table.slot_lengths),
        "class_slots": [num_slots for _, num_slots in plan.slot_classes],
        "staging_slots": plan.staging_slots,
        "codec": plan.stored_dtype,
        "eviction": asked.eviction,
        "prefetch": plan.predictor if asked.prefetch != "none" else "none",
        "policy": asked.policy,
    }


class StepTrace(StepObserver):
    """Writes each step to a trace file (docs/trace.md): a layer's line at its end, all others at once."""

    def __init__(self, trace: Trace, keys: ExpertKeys) -> None:
        self._trace = trace
        self._keys = keys
        self._is_prefill = False
        self._layer = 0
        self._open: dict[str, Any] = {}
        self._found: dict[str, list[int]] = {}

    def begin_step(self, info: StepInfo) -> None:
        """See `StepObserver`."""
        self._is_prefill = info.is_prefill
        self._trace.emit(
            "step", t=self._trace.now(), phase=info.phase, rows=info.num_rows, positions=info.num_positions,
            is_start=info.is_start,
        )  # fmt: skip

    def begin_layer(self, layer: int, routed: Sequence[Sequence[int]], weights: torch.Tensor) -> None:
        """See `StepObserver`. weights: [tokens, k]."""
        self._layer = layer
        self._found = {"hits": [], "late_hits": [], "misses": [], "substituted": []}
        self._open = {"t": self._trace.now(), "layer": layer}
        experts = [self._keys.experts_of(layer, row) for row in routed]
        if self._is_prefill:
            counts = Counter(expert for row in experts for expert in row if expert >= 0)
            self._open["counts"] = [list(item) for item in sorted(counts.items())]
        else:
            self._open["ids"] = experts
            self._open["weights"] = [[round(weight, _WEIGHT_DIGITS) for weight in row] for row in weights.tolist()]

    def looked_up(self, hits: Sequence[int], in_flight: Sequence[int], misses: Sequence[int]) -> None:
        """See `StepObserver`."""
        self._found["hits"] += hits
        self._found["late_hits"] += in_flight
        self._found["misses"] += misses

    def substituted(self, keys: Sequence[int]) -> None:
        """See `StepObserver`."""
        self._found["substituted"] += keys

    def end_layer(self) -> None:
        """See `StepObserver`."""
        found = {kind: self._keys.experts_of(self._layer, keys) for kind, keys in self._found.items()}
        self._trace.emit("layer", **self._open, end=self._trace.now(), **found)

    def stalled(self, began_s: float, ended_s: float) -> None:
        """See `StepObserver`."""
        self._trace.emit("stall", t=self._trace.at(began_s), end=self._trace.at(ended_s), layer=self._layer)

    def guessed(self, layer: int, experts: Sequence[int]) -> None:
        """See `StepObserver`."""
        self._trace.emit("guess", t=self._trace.now(), layer=layer, experts=list(experts))

    def governed(self, share: float, why: str) -> None:
        """See `StepObserver`."""
        self._trace.emit("governor", t=self._trace.now(), share=share, why=why)

    def end(self, stats: EngineStats) -> None:
        """Write the last line, and close the file."""
        self._trace.emit("end", t=self._trace.now(), stats=stats.as_dict())
        self._trace.close()
