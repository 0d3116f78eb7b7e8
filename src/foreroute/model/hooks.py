"""What hooks keep of a forward pass: a router's last arguments, and the residual stream in front of a MoE block.

Routers that take more than the hidden state, or read another than the experts: a hook stores the arguments of each
call. To run such a router ahead, its hidden state is predicted and the rest is that of its last call; token ids, which
hash routers look up, are known before any layer runs and are always the step's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class StepTokens:
    """Token ids of the current step, captured at the model's embedding lookup; None before any."""

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
        """The hidden state [tokens, width] of its last call; None before its first."""
        return self._args[0].reshape(-1, self._args[0].shape[-1]) if self._args else None

    def run_ahead(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """Run the router on `hidden` [tokens, width]; None where its last call had another number of tokens.

        Its other arguments then have another shape, as on the first token after a prompt.
        """
        if not self._args or self._args[0].numel() != hidden.numel():
            return None
        args = [self._current(value, len(hidden)) for value in self._args[1:]]
        kwargs = {name: self._current(value, len(hidden)) for name, value in self._kwargs.items()}
        outputs: tuple[torch.Tensor, ...] = self._module.forward(hidden.reshape(self._args[0].shape), *args, **kwargs)
        return outputs

    def run_on_tokens(
        self, token_ids: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...] | None:
        """Run a router that chooses by `token_ids` [tokens] alone; None before its first call.

        Args:
            hidden: [tokens, width], for its gate weights, which are meaningless without it.
        """
        if not self._args:
            return None
        num_tokens, last = len(token_ids), self._args[0]
        hidden = last.new_zeros(num_tokens, last.shape[-1]) if hidden is None else hidden
        args = [token_ids.reshape(num_tokens, *[1] * (value.ndim - 1)) for value in self._args[1:]]
        kwargs = {name: token_ids.reshape(num_tokens, *[1] * (value.ndim - 1)) for name, value in self._kwargs.items()}
        rows = hidden.reshape(num_tokens, *[1] * (last.ndim - 2), last.shape[-1])
        outputs: tuple[torch.Tensor, ...] = self._module.forward(rows, *args, **kwargs)
        return outputs

    def run_on_step(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """Run `run_on_tokens` on the current step's ids; None where `hidden` [tokens, width] does not belong to it."""
        ids = self._tokens.ids
        return self.run_on_tokens(ids.flatten(), hidden) if ids is not None and ids.numel() == len(hidden) else None

    def _current(self, value: Any, num_tokens: int) -> Any:
        ids = self._tokens.ids
        if ids is None or not isinstance(value, torch.Tensor) or value.is_floating_point():
            return value
        return ids.reshape(value.shape) if value.numel() == ids.numel() == num_tokens else value


def chooses_by_tokens(
    router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], ids_at: int, token_ids: torch.Tensor
) -> bool:
    """Whether `router`, in a call with `args` and `kwargs`, takes token ids and chooses by them alone.

    Args:
        ids_at: position of its choice in its outputs. token_ids: [tokens] of that call.
    """
    more = [*args[1:], *kwargs.values()]
    if len(more) != 1 or not isinstance(more[0], torch.Tensor) or more[0].is_floating_point() or not args:
        return False
    if not torch.equal(more[0].flatten(), token_ids):
        return False
    hidden = args[0]
    others = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(hidden.dtype)
    choices = [router.forward(given, *args[1:], **kwargs)[ids_at] for given in (hidden, others)]
    return torch.equal(*choices)


class ResidualTap:
    """Keeps the residual stream after the latest layer's attention; `remove` removes the hooks.

    Args:
        norms: per MoE layer the norm in front of its MoE block, where it reads the residual; else None.
    Cost: one Python call per layer; memory for one residual.
    """

    def __init__(self, norms: Sequence[nn.Module | None]) -> None:
        self._latest: tuple[int, torch.Tensor] | None = None
        self._handles = [
            norm.register_forward_pre_hook(ResidualHook(self, layer)) for layer, norm in enumerate(norms) if norm
        ]

    def __call__(self, layer: int) -> torch.Tensor | None:
        """The residual [tokens, hidden] of MoE layer `layer`, if that is the latest one and has one; else None."""
        if self._latest is None or self._latest[0] != layer:
            return None
        return self._latest[1].flatten(0, -2)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def keep(self, layer: int, residual: torch.Tensor) -> None:
        """Keep the residual [..., hidden] of MoE layer `layer`."""
        self._latest = (layer, residual)


class ResidualHook:
    """Hears what the norm of one layer is given; model/decode/layers.py calls it where a graph computes that norm."""

    def __init__(self, tap: ResidualTap, layer: int) -> None:
        self._tap, self._layer = tap, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """As torch calls a forward pre-hook."""
        self._tap.keep(self._layer, args[0])
