"""transformers' own block seen through its adapter: what its experts are given, and what each of them is.

`foreroute verify` compares an offloaded model with transformers' at the call of the experts, which blocks with an
adapter do not make. The adapter's forward is run on the family's block in its place, over the block's own weights; its
result is compared with the block's, so that what it shows is what the family computed.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from foreroute.model.adapters.block import EXPERTS, AdaptedBlock, AdaptedExperts
from foreroute.model.adapters.registry import adapter_of
from foreroute.model.experts import ExpertParameter


class Replayed(NamedTuple):
    """The call of a block's experts: hidden [tokens, hidden], ids and weights [tokens, k], and their sum.

    is_same: with this sum the block's result has the family's bits.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    total: torch.Tensor
    is_same: bool


class ResidentBlock:
    """A whole block of a resident model, with its adapter."""

    def __init__(self, adapter: type[AdaptedBlock], block: nn.Module) -> None:
        self._adapter, self.block = adapter, block
        self._held = adapter.held(block)

    @classmethod
    def of(cls, model: nn.Module, experts_name: str) -> "ResidentBlock | None":
        """The block whose experts are named `experts_name` in an offloaded model; None where it has no adapter."""
        name, _, child = experts_name.rpartition(".")
        block = model.get_submodule(name)
        adapter = adapter_of(type(block)) if child == EXPERTS else None
        return None if adapter is None else cls(adapter, block)

    def parts(self, expert: int) -> list[torch.Tensor]:
        """The tensors of `expert` in the order of a slot, without copying those that are not joined."""
        return [self._part(parameter, expert) for parameter in self._held.parameters]

    def replay(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Replayed:
        """Compute the block by its adapter for these arguments, for which the family's own result is `output`."""
        calls: list[tuple[torch.Tensor, ...]] = []
        experts = AdaptedExperts(self._held)

        def compute(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            total = experts.eager_sum(self.parts, hidden, ids, weights)
            calls.append((hidden, ids, weights, total.clone()))
            return total

        experts.engine_forward = compute
        forward: Any = vars(self._adapter).get("forward", type(self.block).forward)
        made = forward(_Seen(self._adapter, self.block, experts), *args, **kwargs)
        ours, theirs = (one[0] if isinstance(one, tuple) else one for one in (made, output))
        ((hidden, ids, weights, total),) = calls
        return Replayed(hidden, ids, weights, total, torch.equal(ours, theirs))

    def _part(self, parameter: ExpertParameter, expert: int) -> torch.Tensor:
        matrices = []
        for group in parameter.held_in:
            tensor = self.block.get_parameter(group[expert if len(group) > 1 else 0]).detach()
            if len(group) == 1 and tensor.ndim > len(parameter.shape):
                tensor = tensor[expert]
            elif len(group) == 1:
                tensor = tensor.unflatten(0, (self._held.num_experts, -1))[expert]
            matrices.append(tensor)
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


class _Seen:
    """The family's block as an adapter's forward sees it: with `experts` and `routing`."""

    def __init__(self, adapter: type[AdaptedBlock], block: nn.Module, experts: AdaptedExperts) -> None:
        self._adapter, self._block, self.experts = adapter, block, experts

    def __getattr__(self, name: str) -> Any:
        for cls in self._adapter.__mro__[: self._adapter.__mro__.index(AdaptedBlock)]:
            if name in vars(cls):
                found = vars(cls)[name]
                return found.__get__(self) if hasattr(found, "__get__") else found
        return getattr(self._block, name)

    def routing(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `AdaptedBlock.route`."""
        route: Any = self._adapter.route
        chosen: tuple[torch.Tensor, ...] = route(self, hidden)
        return chosen
