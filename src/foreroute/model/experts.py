"""Replace a family's experts class: the same module without its weights.

It keeps whatever the family's constructor sets (config, activation, gating, flags, norms) and drops the expert
parameters, which are never allocated. Its forward calls the engine, which knows where the bytes are.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foreroute.checkpoint.assembly import FamilyForm, Gates, Operation
from foreroute.errors import RefusedError

# Numbers of gate and up that are tried, and how far one is moved: within every family's clamps.
_PROBE_WIDTH, _PROBE_STEP = 8, 0.05
_SEAM_MODULE = "transformers.integrations.moe"

# Called with (hidden [tokens, hidden], expert ids [tokens, k] int64, weights [tokens, k]); returns [tokens, hidden].
ExpertsForward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

CLOSED = "This model's experts have been closed; load the model again."


@dataclass(frozen=True, slots=True)
class ExpertParameter:
    """A tensor of every expert.

    name: of the parameter that holds it, or the usual one (adapters/matrices.py). shape: one expert's.
    held_in: of a family off transformers' interface, the tensors of its MoE block that make it, as names there: per
        matrix one tensor of all experts ([experts, ...], or their rows one above the other), or one per expert in
        order. Empty: the parameter of that name.
    operations: on the matrices, to make the one of `shape`. most_stored: as in PartSource.
    """

    name: str
    shape: tuple[int, ...]
    held_in: tuple[tuple[str, ...], ...] = ()
    operations: tuple[Operation, ...] = ()
    most_stored: int = 0


def num_experts(module: nn.Module) -> int:
    """Number of experts in an experts module."""
    # By nn.Module's own table: attributes of families' classes may shadow names.
    return int(next(p for p in module._parameters.values() if p is not None and p.ndim >= 2).shape[0])


def expert_parameters(module: nn.Module) -> tuple[ExpertParameter, ...]:
    """The module's parameters that hold a part of every expert."""
    count = num_experts(module)
    return tuple(
        ExpertParameter(name, tuple(p.shape[1:]))
        for name, p in module._parameters.items()
        if p is not None and p.ndim >= 2 and p.shape[0] == count
    )


def is_experts_class(cls: type) -> bool:
    """Whether transformers' `use_experts_implementation` decorated the class's forward."""
    forward = getattr(cls, "forward", None)
    own = getattr(forward, "__globals__", {}).get("__name__") == _SEAM_MODULE
    return own and hasattr(forward, "__wrapped__")


def family_forward(module: nn.Module) -> Callable[..., torch.Tensor]:
    """The family's eager forward under decorator and replacement: (`module`, hidden [tokens, hidden], ids, weights)."""
    for cls in type(module).__mro__:
        if not issubclass(cls, OffloadedExperts) and is_experts_class(cls):
            wrapped: Callable[..., torch.Tensor] = vars(cls)["forward"].__wrapped__
            return wrapped
    raise AssertionError(f"{type(module).__name__} is not an experts module")


def family_form(module: nn.Module) -> FamilyForm:
    """How the family keeps the matrices of this experts module."""
    # Set by transformers' decorator.
    return FamilyForm(bool(getattr(module, "is_transposed", False)), _gate_order(module))


def _gate_order(module: nn.Module) -> Gates:
    """How the family's gating finds gate and up in one row: by moving one number after the other."""
    flags: Any = module  # set by transformers' decorator
    if not getattr(flags, "has_gate", False):
        return ""
    width = _PROBE_WIDTH
    row = torch.linspace(0.2, 0.8, 2 * width, dtype=torch.float32).view(1, -1)
    with torch.no_grad():
        moved = row + _PROBE_STEP * torch.eye(2 * width, dtype=torch.float32)
        changed = [(flags._apply_gate(one[None]) != flags._apply_gate(row)).nonzero()[:, -1].tolist() for one in moved]
    if changed == [[at % width] for at in range(2 * width)]:
        return "halves"
    return "alternating" if changed == [[at // 2] for at in range(2 * width)] else ""


def refuse_compiled() -> None:
    """Raise if torch.compile is tracing the caller.

    `torch.compiler.is_compiling` is not enough: untraceable code, a raise included, is run again as plain Python.
    Cost: 0.1 us.
    """
    if torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:
        raise RefusedError("A model with offloaded experts cannot be compiled; call it without torch.compile.")


class OffloadedExperts(nn.Module):
    """Mixin in front of a family's experts class. Built by `offloaded_class`, never directly.

    Attributes:
        expert_parameters: parameters that the family would have allocated, in its order.
        num_offloaded: number of experts in the module.
    """

    expert_parameters: tuple[ExpertParameter, ...]
    num_offloaded: int

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            super().__init__(config, *args, **kwargs)
        self.num_offloaded, self.expert_parameters = num_experts(self), expert_parameters(self)
        for parameter in self.expert_parameters:
            del self._parameters[parameter.name]
        # Otherwise transformers would initialise "missing" weights through the family's own initialiser.
        self._is_hf_initialized = not self._parameters and not self._buffers
        parameters = list(inspect.signature(family_forward(self)).parameters)
        self._call_names = tuple(parameters[1:4])
        self.engine_forward: ExpertsForward | None = None

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Compute the routed experts' weighted sum [tokens, hidden] through the engine that `load` attached."""
        refuse_compiled()
        if kwargs:
            args = (*args, *(kwargs[name] for name in self._call_names[len(args) :]))
        if self.engine_forward is None:
            raise RefusedError(CLOSED)
        if args[0].requires_grad:
            raise RefusedError(
                "Gradients cannot pass through offloaded experts: their slots are used again at once. "
                "Call the model under torch.no_grad()."
            )
        return self.engine_forward(*args)


def offloaded_class(experts_class: type[nn.Module]) -> type[OffloadedExperts]:
    """Make a subclass of `experts_class` without experts, under its name and module so that it passes for it."""
    return type(experts_class.__name__, (OffloadedExperts, experts_class), {"__module__": experts_class.__module__})
