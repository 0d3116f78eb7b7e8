"""What a step does, told to a trace: one object that the runtime asks for only when there is one."""

from collections.abc import Sequence
from typing import Any

import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.config import EngineConfig, Plan
from foreroute.engine.stats import EngineStats
from foreroute.trace import VERSION, Trace
from foreroute.transfer.base import Completion

_WEIGHT_DIGITS = 4


def header_of(plan: Plan, asked: EngineConfig, table: ExpertTable, fingerprint: str) -> dict[str, Any]:
    """The fields of a trace's first line: what later readers must know of the model and the engine."""
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
        "staging_slots": plan.staging_slots,
        "codec": plan.stored_dtype,
        "eviction": asked.eviction,
        "prefetch": plan.predictor if asked.prefetch != "none" else "none",
        "policy": asked.policy,
    }


class StepTrace:
    """Collects what becomes of a layer's demand until the layer is over; the rest is written at once.

    Attributes:
        hits, late, misses, stood_in: keys of the layer at hand, added to by the step.
    """

    def __init__(self, trace: Trace, num_experts: int) -> None:
        self._trace = trace
        self._num_experts = num_experts
        self._open: dict[str, Any] = {}
        self.layer = 0
        self.hits: list[int] = []
        self.late: list[int] = []
        self.misses: list[int] = []
        self.stood_in: list[int] = []

    def step(self, phase: str, rows: int, positions: int, is_start: bool) -> None:
        """A forward pass begins."""
        self._trace.emit(
            "step", t=self._trace.now(), phase=phase, rows=rows, positions=positions, is_start=is_start
        )  # fmt: skip

    def begin_layer(self, layer: int, ids: torch.Tensor, weights: torch.Tensor, is_prefill: bool, width: int) -> None:
        """A layer's experts are called. ids, weights: [tokens, k]; width: experts of the layer."""
        self.layer = layer
        self.hits, self.late, self.misses, self.stood_in = [], [], [], []
        self._open = {"t": self._trace.now(), "layer": layer}
        if is_prefill:
            flat = ids.flatten()
            counts = torch.bincount(flat[(flat >= 0) & (flat < width)], minlength=width).tolist()
            self._open["counts"] = [[expert, count] for expert, count in enumerate(counts) if count]
        else:
            self._open["ids"] = [[expert if 0 <= expert < width else -1 for expert in row] for row in ids.tolist()]
            self._open["weights"] = [[round(weight, _WEIGHT_DIGITS) for weight in row] for row in weights.tolist()]

    def found(self, hits: Sequence[int], late: Sequence[int], misses: Sequence[int]) -> None:
        """What became of the keys that are waited for."""
        self.hits += hits
        self.late += late
        self.misses += misses

    def end_layer(self) -> None:
        """The layer's experts have been computed."""
        base = self.layer * self._num_experts
        kinds = {"hits": self.hits, "late": self.late, "misses": self.misses, "stood_in": self.stood_in}
        found = {kind: [key - base for key in keys] for kind, keys in kinds.items()}
        self._trace.emit("layer", **self._open, end=self._trace.now(), **found)

    def stall(self, began_s: float, ended_s: float) -> None:
        """Compute waited for bytes between these readings of the clock."""
        self._trace.emit("stall", t=self._trace.at(began_s), end=self._trace.at(ended_s), layer=self.layer)

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """These experts of `layer` are expected, best first."""
        self._trace.emit("guess", t=self._trace.now(), layer=layer, experts=list(experts))

    def filled(self, keys: Sequence[int]) -> None:
        """These are read though nobody waits: they were stood in for. A trace has it from its transfer."""

    def arrived(self, completions: Sequence[Completion]) -> None:
        """These reads are over. A trace has it from its transfer."""

    def governor(self, share: float, why: str) -> None:
        """From now on so much of the full width is guessed."""
        self._trace.emit("governor", t=self._trace.now(), share=share, why=why)

    def end(self, stats: EngineStats) -> None:
        """The last line."""
        self._trace.emit("end", t=self._trace.now(), stats=stats.as_dict())
        self._trace.close()
