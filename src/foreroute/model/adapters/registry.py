"""Which adapter a class of transformers has, and the experts of a model, whichever way its family keeps them."""

from dataclasses import dataclass

from torch import nn

from foreroute.checkpoint.assembly import FamilyForm
from foreroute.model.adapters.block import EXPERTS, AdaptedBlock
from foreroute.model.adapters.dbrx import DbrxBlock
from foreroute.model.adapters.jetmoe import JetMoeBlock
from foreroute.model.adapters.llama4 import Llama4Block
from foreroute.model.adapters.longcat import LongcatBlock
from foreroute.model.adapters.nllb import NllbBlock
from foreroute.model.adapters.step3p7 import Step3p7Block
from foreroute.model.adapters.switch import SwitchBlock
from foreroute.model.experts import (
    ExpertParameter,
    expert_parameters,
    family_form,
    is_experts_class,
    num_experts,
    offloaded_class,
)

ADAPTERS: tuple[type[AdaptedBlock], ...] = (
    DbrxBlock,
    JetMoeBlock,
    Llama4Block,
    LongcatBlock,
    NllbBlock,
    Step3p7Block,
    SwitchBlock,
)

_BY_CLASS = {
    (f"transformers.models.{adapter.MODULE}.modeling_{adapter.MODULE}", adapter.BLOCK): adapter for adapter in ADAPTERS
}

# By model type: experts that are not offloaded, and why.
REFUSED: dict[str, str] = {
    "doge": "its experts are two vectors each, thousands in a layer and 64 for a token, which one product sums: read "
    "one by one they cost more than they hold; and a prompt's tokens share their gate logits, so that a token's "
    "experts depend on what is computed at once",
}


@dataclass(frozen=True)
class FoundExperts:
    """The experts of one MoE block of a model on the meta device.

    name: of the module that stands for them in the loaded model. holder: of the module whose class is replaced.
    num_experts, parameters, form: as in `HeldExperts`.
    """

    name: str
    holder: str
    holder_class: type[nn.Module]
    num_experts: int
    parameters: tuple[ExpertParameter, ...]
    form: FamilyForm

    def tensors(self, parameter: ExpertParameter) -> tuple[tuple[str, ...], ...]:
        """The names in the model of the tensors that make `parameter`, as in `ExpertParameter.held_in`."""
        held_in = parameter.held_in or ((parameter.name,),)
        return tuple(tuple(f"{self.holder}.{name}" for name in group) for group in held_in)

    @property
    def all_tensors(self) -> frozenset[str]:
        """The names in the model of all tensors that hold its experts."""
        return frozenset(name for one in self.parameters for group in self.tensors(one) for name in group)


def find_experts(model: nn.Module) -> list[FoundExperts]:
    """Every MoE block's experts in `model`, which is whole and on the meta device, in module order."""
    found = []
    for name, module in model.named_modules():
        cls = type(module)
        if is_experts_class(cls):
            count, parameters = num_experts(module), expert_parameters(module)
            found.append(FoundExperts(name, name, cls, count, parameters, family_form(module)))
        elif (adapter := adapter_of(cls)) is not None:
            held = adapter.held(module)
            found.append(FoundExperts(f"{name}.{EXPERTS}", name, cls, held.num_experts, held.parameters, held.form))
    return found


def adapter_of(cls: type[nn.Module]) -> type[AdaptedBlock] | None:
    """The adapter of one of transformers' classes; None where it has none."""
    # A class without its experts has the name of the family's.
    return None if issubclass(cls, AdaptedBlock) else _BY_CLASS.get((cls.__module__, cls.__name__))


def without_experts(cls: type[nn.Module]) -> type[nn.Module]:
    """Make a subclass of `cls`, a class that holds experts, without them, under its name and module."""
    adapter = adapter_of(cls)
    if adapter is None:
        return offloaded_class(cls)
    return type(cls.__name__, (adapter, cls), {"__module__": cls.__module__})
