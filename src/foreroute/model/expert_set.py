"""The experts of one loaded model: where their bytes are, how they are computed, and the layers that call them."""

from dataclasses import dataclass, replace

import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.checkpoint.records import PackedStore
from foreroute.kernels.ggml.form import BlockForm
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.model.blocks import MoeLayer, on_device


@dataclass(frozen=True)
class ExpertSet:
    """Experts of a model for every part of the engine; layers and table are in the order of the model's calls.

    layers: the MoE layers that the probe found.
    table: the experts as they are read: from the packed store if there is one, else from the checkpoint.
    source: the experts as the checkpoint stores them. store: the packed store, or None.
    math: per layer our kernels; None where they could not be proven equal to the family's.
    forms: per layer how ggml's kernels read an expert in its slot; None where torch computes it.
    dtype: of compute. device: of the dense part and the slots. no_form: why a layer that is stored in blocks has no
        form; "" where there is none such.
    """

    layers: tuple[MoeLayer, ...]
    table: ExpertTable
    source: ExpertTable
    store: PackedStore | None
    math: tuple[ExpertMath | None, ...]
    forms: tuple[BlockForm | None, ...]
    dtype: torch.dtype
    device: torch.device
    no_form: str = ""

    @property
    def top_k(self) -> tuple[int, ...]:
        """Experts per token, by layer."""
        return tuple(layer.top_k for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Bytes of slots for all experts."""
        return self.table.whole_bytes

    @property
    def token_demand_bytes(self) -> int:
        """Bytes of slots for the experts that one token uses."""
        return sum(k * length for k, length in zip(self.top_k, self.table.slot_lengths, strict=True))

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of an expert: the mean of those that a token uses, where layers' experts differ in size."""
        token = sum(k * layer.expert_nbytes for k, layer in zip(self.top_k, self.table.layers, strict=True))
        return round(token / sum(self.top_k))

    @property
    def has_own_math(self) -> bool:
        """Whether our kernels compute every layer, so that experts can be skipped or computed one by one."""
        return all(entry is not None for entry in self.math)

    @property
    def math_name(self) -> str:
        """Which kernels compute the experts, for the plan: "ggml", "own" (torch's), or the "family"'s own forward."""
        if all(form is not None for form in self.forms):
            return "ggml"
        return "own" if self.has_own_math else "family"

    def on(self, device: torch.device) -> "ExpertSet":
        """The same set after the dense part has been moved to `device`."""
        return replace(self, layers=tuple(on_device(list(self.layers), device)), device=device)
