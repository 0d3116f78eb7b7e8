"""Train the paper's estimator (predict/fitted.py) on text that passes: by Adam, on the next router's distribution."""

import math
from dataclasses import dataclass

import torch

from foreroute.predict.fitted import estimate

_BETAS, _EPSILON, _WARMUP_SHARE = (0.9, 0.99), 1e-8, 0.02


@dataclass(frozen=True)
class EstimatorSettings:
    """Sizes and training settings.

    shrink: m, hidden width over inner width. widen: n, the MLP's width over the inner width.
    epochs: passes over each kept token. batch: rows per step. peak_rate: of Adam; falls to 0 as a cosine.
    buffer_bytes: activations kept at a time; more than that is trained on in turns.
    """

    shrink: int = 2
    widen: int = 2
    epochs: int = 8
    batch: int = 512
    peak_rate: float = 3e-3
    buffer_bytes: int = 512 * 2**20
    seed: int = 0


def new_weights(hidden: int, num_layers: int, num_experts: int, settings: EstimatorSettings) -> dict[str, torch.Tensor]:
    """Random float32 weights by name (embed [num_layers, d], head [num_experts, d], ...; d = hidden / settings.shrink);
    the same for the same seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    inner = max(1, hidden // settings.shrink)
    wide = inner * settings.widen

    def linear(rows: int, cols: int) -> torch.Tensor:
        return torch.randn(rows, cols, generator=generator, dtype=torch.float32) / math.sqrt(rows)

    return {
        "down": linear(hidden, inner),
        "layer": torch.zeros(num_layers, inner, dtype=torch.float32),
        "up": linear(inner, wide),
        "up_bias": torch.zeros(wide, dtype=torch.float32),
        "back": linear(wide, inner) * 0.1,
        "back_bias": torch.zeros(inner, dtype=torch.float32),
        "norm": torch.ones(inner, dtype=torch.float32),
        "norm_bias": torch.zeros(inner, dtype=torch.float32),
        "head": linear(inner, num_experts),
        "head_bias": torch.zeros(num_experts, dtype=torch.float32),
    }


class EstimatorTraining:
    """Collects activations in a bounded buffer and trains whenever it is full, and at the end.

    `tensors` holds all that training depends on, so that it can be stopped between passes and resumed.

    Args:
        num_experts: per MoE layer. total_tokens: tokens that will be added, for the learning rate.
    """

    def __init__(self, hidden: int, num_experts: list[int], total_tokens: int, settings: EstimatorSettings) -> None:
        self._settings = settings
        self._total_tokens = total_tokens
        num_guessed, widest = len(num_experts) - 1, max(num_experts)
        self.weights = new_weights(hidden, num_guessed, widest, settings)
        self._moments = {
            f"{name}.{order}": torch.zeros_like(weight)
            for name, weight in self.weights.items()
            for order in ("mean", "square")
        }
        per_token = num_guessed * (hidden + widest) * 2
        capacity = max(1, min(total_tokens, settings.buffer_bytes // max(1, per_token)))
        self._inputs = torch.zeros(num_guessed, capacity, hidden, dtype=torch.bfloat16)
        self._targets = torch.zeros(num_guessed, capacity, widest, dtype=torch.bfloat16)
        # Tokens in the buffer; tokens trained on; optimiser steps.
        self._counts = torch.zeros(3, dtype=torch.int64)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The whole state by name, not copies: weights, Adam's moments, and buffers [layers, rows, width]."""
        named = {"inputs": self._inputs, "targets": self._targets, "counts": self._counts}
        return {**named, **{f"weights.{name}": w for name, w in self.weights.items()}, **self._moments}

    def add(self, layer: int, inputs: torch.Tensor, target: torch.Tensor) -> None:
        """Buffer the tokens of layer `layer` in the current pass.

        Args:
            inputs: [tokens, hidden], as the estimator will read them.
            target: [tokens, experts] the next layer's distribution over its experts, rows summing to 1.
        """
        capacity = self._inputs.shape[1]
        every = -(-len(inputs) // capacity)
        kept = inputs[::every]
        if layer == 0 and int(self._counts[0]) + len(kept) > capacity:
            self.train()
        rows = slice(int(self._counts[0]), int(self._counts[0]) + len(kept))
        self._inputs[layer, rows] = kept.to(torch.bfloat16)
        self._targets[layer, rows, : target.shape[1]] = target[::every].to(torch.bfloat16)
        if layer == len(self._inputs) - 1:
            self._counts[0] += len(kept)

    def train(self) -> None:
        """Train on the buffered tokens, and empty the buffer."""
        filled, num_layers = int(self._counts[0]), len(self._inputs)
        if not filled:
            return
        settings = self._settings
        generator = torch.Generator().manual_seed(settings.seed + 1 + int(self._counts[1]))
        rows = filled * num_layers
        starts = range(0, rows, settings.batch)
        span = filled / self._total_tokens
        for epoch in range(settings.epochs):
            order = torch.randperm(rows, generator=generator)
            for start in starts:
                done = (epoch + start / rows) / settings.epochs
                chosen = order[start : start + settings.batch]
                layer, token = chosen // filled, chosen % filled
                self._step(layer, token, int(self._counts[1]) / self._total_tokens + done * span)
        self._counts[1] += filled
        self._counts[0] = 0
        self._targets.zero_()

    def _step(self, layer: torch.Tensor, token: torch.Tensor, progress: float) -> None:
        names = list(self.weights)
        with torch.enable_grad():
            leaves = {name: self.weights[name].detach().requires_grad_() for name in names}
            logits = estimate(leaves, self._inputs[layer, token], layer)
            target = self._targets[layer, token].float()
            # The target's own entropy does not depend on the weights: cross-entropy has the gradient of the KL.
            loss = -(target * torch.log_softmax(logits, -1)).sum(-1).mean()
            gradients = torch.autograd.grad(loss, [leaves[name] for name in names])
        self._counts[2] += 1
        step = int(self._counts[2])
        rate = self._settings.peak_rate * min(1.0, progress / _WARMUP_SHARE + 0.01)
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        for name, gradient in zip(names, gradients, strict=True):
            mean, square = self._moments[f"{name}.mean"], self._moments[f"{name}.square"]
            mean.lerp_(gradient, 1 - _BETAS[0])
            square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
            scale = (square / (1 - _BETAS[1] ** step)).sqrt_().add_(_EPSILON)
            self.weights[name].addcdiv_(mean, scale, value=-rate / (1 - _BETAS[0] ** step))
