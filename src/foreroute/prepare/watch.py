"""Observe a model run over text: every MoE layer's input, routing and gate logits."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.blocks import first_decoded
from foreroute.model.caches import last_logits_only
from foreroute.model.experts import ExpertsForward
from foreroute.model.hooks import ResidualTap
from foreroute.predict.base import RouterSample
from foreroute.prepare.controls import Moment
from foreroute.prepare.corpus import calls_of
from foreroute.prepare.on_policy import Substitutes

# (moment, gate logits [tokens, experts] or None where the router returns none).
MomentListener = Callable[[Moment, torch.Tensor | None], None]
RowsListener = Callable[[int, int, torch.Tensor], None]


class Watch:
    """Runs windows of tokens through a model of `foreroute.load` and reports every MoE layer; see `watching`."""

    def __init__(self, model: OffloadedModel, on_moment: MomentListener) -> None:
        self._model = model
        self._on_moment = on_moment
        self._layers = model.foreroute.layers
        self._logits: dict[int, torch.Tensor] = {}
        self._before: RouterSample | None = None
        # Of each MoE layer's side: [rows, positions].
        self._read = self._written = torch.empty(0, 0, dtype=torch.int64)
        self._first = first_decoded(self._layers)
        self._pass_index = -1
        self.tap = ResidualTap([layer.norm for layer in self._layers])
        # The vocabulary's logits are the largest tensor of all, and not needed.
        self._options = last_logits_only(model)

    def run(self, windows: torch.Tensor, pass_index: int) -> None:
        """Run one forward pass over `windows` [rows, context]; `pass_index` seeds the controls."""
        self._pass_index, self._before = pass_index, None
        arguments, self._written = calls_of(self._model, windows)
        self._read = arguments["input_ids"]
        with torch.no_grad():
            self._model(**arguments, use_cache=False, **self._options)
        self._before = None

    def observe(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Observe MoE `layer`: its input `hidden` [tokens, hidden], and `ids` and gate `weights` [tokens, k]."""
        seen = RouterSample(hidden, ids, weights, self.tap(layer))
        width = self._layers[layer].experts.num_offloaded
        if layer == self._first:
            self._before = None
        ids_of_side = self._read if layer < self._first else self._written
        moment = Moment(
            layer,
            width,
            seen,
            self._before,
            ids_of_side.flatten(),
            ids_of_side.shape[1],
            self._pass_index,
        )
        logits = self._logits.pop(layer, None)
        self._before = seen
        self._on_moment(moment, None if logits is None else logits[:, :width])

    def without_missing(self, layer: int, compute: ExpertsForward, substitutes: Substitutes) -> ExpertsForward:
        """Wrap `layer`'s `compute`: replace missing experts by `substitutes`, and observe the true routing."""

        def forward(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            before = self._before
            self.observe(layer, hidden, ids, weights)
            missing = substitutes.missing(layer, before, ids)
            if missing is None:
                return compute(hidden, ids, weights)
            total = compute(hidden, ids, weights.masked_fill(missing, 0))
            return total + substitutes.sum_of(layer, RouterSample(hidden, ids, weights * missing))

        return forward

    def catch_logits(self, layer: int, at: int) -> Any:
        """A forward hook for `layer`'s router, whose logits are output number `at`."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._logits[layer] = output[at].flatten(0, -2)

        return hook


@contextmanager
def watching(
    model: OffloadedModel,
    on_moment: MomentListener,
    on_rows: RowsListener | None = None,
    substitutes: Substitutes | None = None,
) -> Iterator[Watch]:
    """Observe a model; inside, `run` reports every MoE layer to `on_moment` and every expert's outputs to `on_rows`.

    With `substitutes` the model runs as under a policy that does not wait; the reported states are those of that run.

    Memory: the samples of two neighbouring layers, and the gate logits of one.
    """
    watch = Watch(model, on_moment)
    handle = model.foreroute
    engine = handle.host_engine
    hooks = [
        layer.router.module.register_forward_hook(watch.catch_logits(layer.index, layer.router.logits_at))
        for layer in handle.layers
        if layer.router is not None and layer.router.logits_at >= 0
    ]
    engine.expert_listener = on_rows
    if substitutes is None:
        engine.routing_listener = watch.observe
        computing: AbstractContextManager[None] = nullcontext()
    else:
        computing = handle.computing(partial(watch.without_missing, substitutes=substitutes))
    try:
        with computing:
            yield watch
    finally:
        engine.routing_listener = engine.expert_listener = None
        watch.tap.remove()
        for hook in hooks:
            hook.remove()
