"""Protocols around the step: what a model asks of its engine, and the predictor, learner and observers it is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from foreroute.engine.approximation import Approximation
from foreroute.engine.stats import EngineStats
from foreroute.predict.governor import Governor
from foreroute.transfer.base import Completion

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class StepInfo:
    """One forward pass of [num_rows, num_positions] tokens, as the loop that runs it knows it.

    phase: "prefill" computes a prompt or a chunk of one, of a single token too; "decode" one chosen token per row.
    token_ids: [num_rows, num_positions] int64; None where there are embeddings in their place.
    padding: [num_rows x num_positions] bool, which positions are padding: no expert computes them, and nothing is
        learnt from them. None where there is none.
    is_start: nothing was computed before it.
    """

    phase: Phase
    num_rows: int
    num_positions: int
    token_ids: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    is_start: bool = False

    @classmethod
    def of(
        cls, phase: Phase, token_ids: torch.Tensor, padding: torch.Tensor | None = None, *, is_start: bool = False
    ) -> "StepInfo":
        """The step that computes `token_ids` [rows, positions]."""
        num_rows, num_positions = token_ids.shape
        return cls(phase, num_rows, num_positions, token_ids, padding, is_start)

    @property
    def is_prefill(self) -> bool:
        """A prompt, or a chunk of one, is computed."""
        return self.phase == "prefill"

    @property
    def num_tokens(self) -> int:
        """Positions that are no padding. Cost: a read-back where there is padding."""
        num_padding = 0 if self.padding is None else int(self.padding.sum())
        return self.num_rows * self.num_positions - num_padding


class MoeEngine(Protocol):
    """What a loaded model asks of its engine: `MoeStep` on the host, `DeviceTier` on a device that pages for itself.

    Attributes:
        policies: what decoding waits for. governor: decides how much is prefetched; None where nobody does.
    """

    @property
    def policies(self) -> Approximation: ...

    @property
    def governor(self) -> Governor | None: ...

    @property
    def is_prefill(self) -> bool:
        """The step at hand, or the last one, is a prompt's."""
        ...

    def begin_step(self, info: StepInfo) -> None:
        """A forward pass begins.

        Raises:
            PolicyError: policies were set for another number of rows.
        """
        ...

    def compute(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The routed experts' weighted sum [tokens, hidden] for MoE layer `layer`.

        Args:
            hidden: [tokens, hidden]. weights: [tokens, k].
            ids: [tokens, k] int64; those that are no expert of the layer are ignored.
        """
        ...

    def snapshot(self) -> EngineStats:
        """A copy of all counts since the model was loaded."""
        ...

    def close(self) -> None:
        """Stop the readers and free the pool; the model's experts can no longer be computed."""
        ...


class PrefetchSource(Protocol):
    """Guesses the experts of the MoE layer after `layer` from what crosses the seam there, as plain lists."""

    def guess(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Sequence[int]:
        """Expert indices of MoE layer `layer + 1`, distinct, best first; empty when there is nothing to say.

        hidden: [tokens, hidden], the router's input. ids, weights: [tokens, k], its answer.
        """
        ...

    def guess_first(self, token_ids: torch.Tensor) -> Sequence[int]:
        """Expert indices of MoE layer 0 for the step's `token_ids` [tokens], as above."""
        ...

    def see_first(self, hidden: torch.Tensor, num_rows: int) -> None:
        """The router input of MoE layer 0, [rows x positions, hidden], of every step."""
        ...


class OnlineLearner(Protocol):
    """Improves guesses with the routing that passes by, in the time that compute waits for bytes."""

    def see(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """A layer's routing is known; arguments as of `PrefetchSource.guess`."""
        ...

    def work(self) -> bool:
        """Do a little; False when there is nothing to do."""
        ...

    def pause(self) -> None:
        """Guesses are switched off: learn nothing until `resume`."""
        ...

    def resume(self) -> None:
        """Guesses are wanted again; nothing happens where they were not switched off."""
        ...

    def close(self) -> None:
        """Stop learning and free its buffers."""
        ...


class StepObserver:
    """Is told what the engine does, by the engine's thread and as it happens; a subclass overrides what it wants.

    An observer must change nothing, and an error that it raises breaks the step off. Keys are expert keys.
    """

    def begin_step(self, info: StepInfo) -> None:
        """A forward pass begins."""

    def begin_layer(self, layer: int, routed: Sequence[Sequence[int]], weights: torch.Tensor) -> None:
        """A MoE layer begins. routed: per token its expert keys, negative where none. weights: [tokens, k]."""

    def looked_up(self, hits: Sequence[int], in_flight: Sequence[int], misses: Sequence[int]) -> None:
        """Demanded keys: resident, being read already, absent. More than once where some arrive in the end."""

    def substituted(self, keys: Sequence[int]) -> None:
        """Default vectors took the place of these demanded experts."""

    def guessed(self, layer: int, experts: Sequence[int]) -> None:
        """These experts of `layer` are expected, best first; those that are absent are prefetched."""

    def deferred(self, keys: Sequence[int]) -> None:
        """Deferred loads of these experts, which had been substituted, were queued."""

    def arrived(self, completions: Sequence[Completion]) -> None:
        """These reads are over."""

    def stalled(self, began_s: float, ended_s: float) -> None:
        """Compute waited for bytes between these readings of the engine's clock."""

    def governed(self, share: float, why: str) -> None:
        """From now on this share of the full width is guessed."""

    def end_layer(self) -> None:
        """The layer's experts have been computed."""

    def end(self, stats: EngineStats) -> None:
        """The model is closed."""


# Called at the start of a layer's step, with (layer, hidden, ids, weights).
RoutingListener = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
