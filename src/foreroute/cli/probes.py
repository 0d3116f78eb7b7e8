"""For `plan`: measure the compute time of one token on the loaded model; count what reading an expert takes."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.engine.interfaces import StepInfo
from foreroute.model.blocks import first_decoded
from foreroute.model.caches import one_decoded
from foreroute.model.experts import ExpertsForward
from foreroute.types import ExpertReads, round_down, round_up

if TYPE_CHECKING:
    from foreroute.loading.offloaded_model import OffloadedModel

_WARM_UP_PASSES = 2
_TIMED_PASSES = 7
_TOKEN = 1
# After so long no layer is begun: `plan` answers within seconds, whatever the model.
_LIMIT_S = 2.0


@dataclass(frozen=True)
class ComputeTime:
    """The time to compute one token whose experts are resident.

    num_passes: passes of which it is the median; 0 where time ran out within the first, which reads its experts: then
    it is the time of the first num_layers MoE layers (of all, otherwise) without waiting, times all layers by these.
    """

    ms: float
    num_passes: int
    num_layers: int


@dataclass(frozen=True)
class ReadCost:
    """What it takes to read an expert: of the first layer the reads, on average over layers the bytes in whole pages.

    packed_nbytes: the same bytes if it is, or were, a record of a packed store, which is one read.
    """

    reads: int
    nbytes: int
    packed_nbytes: int


def read_cost(table: ExpertTable, reads_of: Callable[[int], ExpertReads]) -> ReadCost:
    """Count it by the experts of `table` and their reads."""
    now = packed = 0
    for at, layer in enumerate(table.layers):
        reads = reads_of(table.keys.key(at, 0))
        pages = sum(round_up(read.offset + read.nbytes) - round_down(read.offset) for read in reads)
        now += layer.num_experts * pages
        packed += layer.num_experts * layer.layout.slot_bytes
    return ReadCost(len(reads_of(table.keys.key(0, 0))), now // table.total_slots, packed // table.total_slots)


class _OutOfTime(Exception):
    """Ends a pass between two layers."""


class _Watch:
    """Counts the MoE layers of a pass, and ends it between two of them once time is up."""

    def __init__(self, num_layers: int, limit_s: float, clock: Callable[[], float]) -> None:
        self._num_layers, self._clock = num_layers, clock
        self._ends_s = clock() + limit_s
        self.num_done = 0

    @property
    def is_over(self) -> bool:
        """Whether time is up."""
        return self._clock() >= self._ends_s

    def __call__(self) -> None:
        """A layer's experts have been computed."""
        self.num_done += 1
        if self.num_done < self._num_layers and self.is_over:
            raise _OutOfTime


def measure_compute(
    model: "OffloadedModel", *, limit_s: float = _LIMIT_S, clock: Callable[[], float] = time.perf_counter
) -> ComputeTime:
    """Measure one token's forward pass as decoding computes it, with its experts in memory, without stalls.

    The same token each time routes to the same experts, so they are resident after the first pass.

    Args:
        limit_s: no layer is begun after it; one layer at least is computed. clock: seconds, monotonic.
    """
    layers = model.foreroute.layers
    num_layers = len(layers) - first_decoded(layers)
    watch = _Watch(num_layers, limit_s, clock)
    passes_ms: list[float] = []

    def wrapped(_: int, compute: ExpertsForward) -> ExpertsForward:
        def watched(*args: torch.Tensor) -> torch.Tensor:
            output = compute(*args)
            watch()
            return output

        return watched

    # Not by hooks, for which a graph would leave the choice of experts to the family's router.
    with model.foreroute.computing(wrapped):
        while len(passes_ms) < _WARM_UP_PASSES + _TIMED_PASSES and not (passes_ms and watch.is_over):
            elapsed_ms = _pass_ms(model, watch, clock)
            if watch.num_done < num_layers:
                if not passes_ms:
                    return ComputeTime(elapsed_ms * num_layers / watch.num_done, 0, watch.num_done)
                break
            passes_ms.append(elapsed_ms)
    # Where few passes were made, the last of them is the warmest.
    timed = passes_ms[_WARM_UP_PASSES:] or passes_ms[-1:]
    return ComputeTime(statistics.median(timed), len(timed), num_layers)


def _pass_ms(model: "OffloadedModel", watch: _Watch, clock: Callable[[], float]) -> float:
    """Milliseconds of one pass, or of its part before time was up, without stalls."""
    token = torch.tensor([[_TOKEN]], device=model.device)
    watch.num_done = 0
    stalled_s = model.foreroute.stats().decode.stall_s
    started_s = clock()
    try:
        with torch.inference_mode(), model.foreroute.step(StepInfo("decode", 1, 1)):
            model(**one_decoded(model, token), use_cache=False)
    except _OutOfTime:
        pass
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    elapsed_s = clock() - started_s
    return float(elapsed_s - (model.foreroute.stats().decode.stall_s - stalled_s)) * 1e3
