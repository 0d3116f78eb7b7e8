"""What a router was given last: for routers that take more than the hidden state, or read another than the experts do.

A hook keeps the arguments of each call. To run such a router ahead, the hidden state is guessed and the rest is that of
its last call; token ids, which hash routers look up, are known before any layer runs and are always the step's own.
"""

from typing import Any

import torch
from torch import nn


class StepTokens:
    """The token ids of the step that runs, caught where the model looks up their embeddings; None before any."""

    def __init__(self, embeddings: nn.Module) -> None:
        self.ids: torch.Tensor | None = None
        embeddings.register_forward_pre_hook(self._catch)

    def _catch(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor) and not args[0].is_floating_point():
            self.ids = args[0]


class LastCall:
    """Keeps a router's last arguments. Cost: one Python call per layer; no copy."""

    def __init__(self, module: nn.Module, tokens: StepTokens) -> None:
        self._module, self._tokens = module, tokens
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args, self._kwargs = args, kwargs

    @property
    def hidden(self) -> torch.Tensor | None:
        """[tokens, width] that it read last; None before its first call."""
        return self._args[0].reshape(-1, self._args[0].shape[-1]) if self._args else None

    def run_ahead(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """The router's outputs on `hidden` [tokens, width]; None where its last call was of another number of tokens.

        What came with those tokens is then of another shape, as on the first token after a prompt.
        """
        if not self._args or self._args[0].numel() != hidden.numel():
            return None
        args = [self._current(value, len(hidden)) for value in self._args[1:]]
        kwargs = {name: self._current(value, len(hidden)) for name, value in self._kwargs.items()}
        outputs: tuple[torch.Tensor, ...] = self._module.forward(hidden.reshape(self._args[0].shape), *args, **kwargs)
        return outputs

    def _current(self, value: Any, num_tokens: int) -> Any:
        ids = self._tokens.ids
        if ids is None or not isinstance(value, torch.Tensor) or value.is_floating_point():
            return value
        return ids.reshape(value.shape) if value.numel() == ids.numel() == num_tokens else value
