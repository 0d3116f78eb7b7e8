"""One rung of the ladder on one shape: a tier of a given number of slots, decoded under given routes, timed."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import foreroute  # noqa: F401  before torch, which then spins less

# isort: split
import torch

from benchmarks.gpu.routes import Routes
from benchmarks.gpu.shapes import Shape
from foreroute.device.build import assemble_tier
from foreroute.device.tier import DeviceTier
from foreroute.engine.approximation import Approximation
from foreroute.generation.graph_decoder import GraphDecoder
from foreroute.loading.step_entry import Bounds, StepEntry
from foreroute.model.hooks import ResidualTap
from foreroute.predict.base import RouterSample, TokenGuess
from foreroute.predict.lookahead import RouterLookahead

# Shares of the experts on the device; 0 is what a layer needs and no more: the paper's two buffers of top-k experts.
RESIDENCIES = (0.0, 0.125, 0.25, 0.5)
_PROMPT_TOKENS = 8


@dataclass(frozen=True)
class Rung:
    """share: of the experts on the device, 0 for the least that works. guess: none, lookahead, oracle.

    follows_guess: what was guessed is computed in place of what was chosen: the published engine's mode.
    """

    name: str
    share: float
    guess: str
    follows_guess: bool = False


LADDER = (
    Rung("on demand", 0.0, "none"),
    Rung("paper's mode", 0.0, "oracle", follows_guess=True),
    *(
        Rung(f"{name} {share:.1%}", share, guess)
        for share in RESIDENCIES[1:]
        for name, guess in (("cache", "none"), ("+ prefetch", "lookahead"), ("oracle", "oracle"))
    ),
    Rung("resident", 1.0, "none"),
)


@dataclass(frozen=True)
class Measured:
    """A rung's figures. tpot_ms: median of the steps. moved_mb: per token, over the link; floor_ms: what that takes."""

    shape: str
    routes: str
    rung: str
    num_slots: int
    tpot_ms: float
    tpot_ms_low: float
    tpot_ms_high: float
    moved_mb: float
    floor_ms: float
    hit_rate: float
    is_graph: bool

    def row(self) -> dict[str, Any]:
        """As it is kept."""
        return asdict(self)


class _Injected:
    """Routes of the step at hand, on the device, moved on by the step itself: part of the graph."""

    def __init__(self, routes: Routes, device: torch.device, *, follows_guess: bool) -> None:
        chosen = routes.guessed if follows_guess else routes.chosen
        self._chosen, self._guessed = chosen.to(device), routes.guessed.to(device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._last = len(chosen) - 1

    def chosen(self, layer: int) -> torch.Tensor:
        """[1, k]."""
        return self._chosen[:, layer].index_select(0, self._step)

    def guessed(self, layer: int) -> torch.Tensor:
        """[1, k]."""
        return self._guessed[:, layer].index_select(0, self._step)

    def move_on(self) -> None:
        """The next step's."""
        self._step.add_(1).clamp_(max=self._last)


def tier_of(shape: Shape, rung: Rung, routes: Routes, device: torch.device) -> DeviceTier:
    """The rung's tier, attached to the shape's model."""
    top_k = max(layer.top_k for layer in shape.layers)
    staging = 0 if rung.guess == "none" or rung.share == 1.0 else top_k if rung.share == 0.0 else 2 * top_k
    num_slots = max(top_k + staging, round(rung.share * shape.table.total_slots))
    injected = _Injected(routes, device, follows_guess=rung.follows_guess)

    def guess(layer: int, seen: RouterSample, width: int) -> TokenGuess:
        ids = injected.chosen(layer + 1) if rung.guess == "oracle" else injected.guessed(layer + 1)
        return TokenGuess(ids, torch.ones(ids.shape, device=device))

    exact = Approximation(
        list, lambda: RouterLookahead([]), lambda: ResidualTap([layer.norm for layer in shape.layers]), {}, None
    )
    tier = assemble_tier(
        shape.layers, shape.table, shape.arena, range(shape.table.total_slots), num_slots, staging, shape.math,
        shape.model.dtype, device, exact, guess=guess,
    )  # fmt: skip
    last = len(shape.layers) - 1

    def computing(layer: int) -> Any:
        def forward(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            if tier.is_prefill:
                return torch.zeros_like(hidden)
            out = tier.compute(layer, hidden, injected.chosen(layer), weights)
            if layer == last:
                injected.move_on()
            return out

        return forward

    for layer in shape.layers:
        layer.experts.engine_forward = computing(layer.index)
    return tier


def run(
    shape: Shape, rung: Rung, routes: Routes, device: torch.device, link_bytes_per_s: float, steps: int
) -> Measured:
    """Decode under the routes: half of them to fill the pool, the rest timed step by step."""
    tier = tier_of(shape, rung, routes, device)
    shape.model.foreroute = _Handle(tier, shape.model, device)
    try:
        decoder = GraphDecoder(shape.model, 1, _PROMPT_TOKENS + len(routes.chosen) + 8)
        if rung.share == 1.0:
            # As if a prompt had used every expert: all are put into the pool before the first step.
            tier.buffers.uses[:, : shape.table.num_experts].fill_(1)
        decoder.prefill(torch.ones(1, _PROMPT_TOKENS, dtype=torch.int64))
        token = torch.ones(1, 1, dtype=torch.int64, device=device)
        for _ in range(len(routes.chosen) - steps):
            decoder.step(token)
        before = tier.state.counts()
        seconds = [_timed(decoder, token, device) for _ in range(steps)]
        after = tier.state.counts()
    finally:
        del shape.model.foreroute
        # The arena stays for the next rung; the pool has to go before that rung's is made.
        tier.buffers.close()
        for layer in shape.layers:
            layer.experts.engine_forward = None
    moved = {name: (after[name] - before[name]) / steps for name in after}
    moved_bytes = (moved["misses"] + moved["prefetched"]) * shape.table.slot_bytes
    demanded = moved["hits"] + moved["late_hits"] + moved["misses"]
    return Measured(
        shape.name, routes.name, rung.name, tier.state.num_slots, statistics.median(seconds) * 1e3,
        min(seconds) * 1e3, max(seconds) * 1e3, moved_bytes / 1e6, moved_bytes / link_bytes_per_s * 1e3,
        (moved["hits"] + moved["late_hits"]) / demanded, decoder.is_captured,
    )  # fmt: skip


class _Handle:
    """What `GraphDecoder` asks of a model of `load`."""

    def __init__(self, tier: DeviceTier, model: Any, device: torch.device) -> None:
        self.engine = tier
        self.entry = StepEntry(tier, len(tier.table.layers), Bounds.of(model), device)
        self.lock = self.entry.lock


def _timed(decoder: GraphDecoder, token: torch.Tensor, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started_s = time.perf_counter()
    decoder.step(token)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s
