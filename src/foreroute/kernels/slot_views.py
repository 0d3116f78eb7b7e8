"""View slots as torch tensors over the pool's memory, one set per slot and kind of layer, made once."""

import math as scalar_math
import mmap
from collections.abc import Sequence

import torch

from foreroute.checkpoint.layouts import ExpertLayout, Part
from foreroute.kernels.torch.dequantise import DequantisingMath
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.types import SlotClass

TORCH_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
    "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


# Most bytes of experts held converted at once; one expert is always allowed.
_CONVERTED_BYTES = 2**24


class SlotViews:
    """The parts of the expert that a slot holds, as tensors over the slot's bytes.

    Args:
        memory: the pool, 4096-byte aligned; kept alive by the views. On a device, a uint8 tensor [bytes].
        slots: one per MoE layer, or the length of all slots.
        layouts: one per MoE layer.
        math: one per MoE layer; decides the form of its operands. None takes the parts as stored.
        compute_dtype: parts stored in another dtype are converted at each call.
    """

    def __init__(
        self,
        memory: mmap.mmap | torch.Tensor,
        slots: Sequence[SlotClass] | int,
        layouts: Sequence[ExpertLayout],
        math: Sequence[ExpertMath | None],
        compute_dtype: torch.dtype,
    ) -> None:
        self._memory: mmap.mmap | torch.Tensor | None = memory
        self._layouts = list(layouts)
        self._slots = [SlotClass(slots, 0, (), 0)] * len(layouts) if isinstance(slots, int) else list(slots)
        self._math = list(math)
        # Slot -> views, shared by layers whose experts look alike.
        tables: dict[object, dict[int, tuple[torch.Tensor, ...]]] = {}
        self._views = [
            tables.setdefault((layout, None if entry is None else entry.operand_kind), {})
            for layout, entry in zip(layouts, math, strict=True)
        ]
        self._compute_dtype = compute_dtype
        self._is_stored_so = [
            (entry is not None and entry.takes_stored)
            or all(TORCH_DTYPES[part.dtype] == compute_dtype for part in layout.parts)
            for layout, entry in zip(layouts, math, strict=True)
        ]

    def operands(self, layer: int, slot: int) -> tuple[torch.Tensor, ...]:
        """Return the operands (weights [in, out]) of MoE layer `layer`'s expert in `slot`, in the compute dtype."""
        views = self._views[layer].get(slot)
        if views is None:
            views = self._views[layer][slot] = self._make(layer, slot)
        if self._is_stored_so[layer]:
            return views
        return tuple(view.to(self._compute_dtype) for view in views)

    def most_at_once(self, layer: int) -> int | None:
        """Number of `layer`'s experts whose operands may be held at once; None: all, as they are views."""
        if self._is_stored_so[layer]:
            return None
        num_values = sum(scalar_math.prod(part.shape) for part in self._layouts[layer].parts)
        return max(1, _CONVERTED_BYTES // (num_values * self._compute_dtype.itemsize))

    def as_family(self, layer: int, operands: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return the family's tensors ([out, in] weights) of an expert of `layer`: `operands`, or dequantised ones."""
        math = self._math[layer]
        return math.family_parts(operands) if isinstance(math, DequantisingMath) else operands

    def clear(self) -> None:
        """Drop all views, so that the pool's memory can be freed."""
        for views in self._views:
            views.clear()
        self._memory = None

    def _make(self, layer: int, slot: int) -> tuple[torch.Tensor, ...]:
        assert self._memory is not None, "the pool has been closed"
        start = self._slots[layer].offset(slot)
        parts = [_part(self._memory, part, start + part.offset) for part in self._layouts[layer].parts]
        math = self._math[layer]
        return tuple(parts) if math is None else math.operands(parts)


def _part(memory: mmap.mmap | torch.Tensor, part: Part, offset: int) -> torch.Tensor:
    dtype = TORCH_DTYPES[part.dtype]
    if isinstance(memory, torch.Tensor):
        return memory[offset : offset + part.nbytes].view(dtype).view(part.shape)
    return torch.frombuffer(memory, dtype=dtype, count=part.nbytes // dtype.itemsize, offset=offset).view(part.shape)
