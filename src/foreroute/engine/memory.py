"""Slots as torch tensors: views into the pool's memory, one set per slot and layout, made once."""

import mmap
from collections.abc import Sequence

import torch

from foreroute.checkpoint.layouts import ExpertLayout

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SlotViews:
    """The parts of whatever expert a slot holds, as tensors over the slot's own bytes (no copy, no ownership).

    Args:
        memory: the pool, num_slots * slot_bytes long, 4096-byte aligned.
        layouts: one per MoE layer; equal layouts share their views.
        compute_dtype: parts stored in another dtype are converted when asked for, each time.
    """

    def __init__(
        self, memory: mmap.mmap, slot_bytes: int, layouts: Sequence[ExpertLayout], compute_dtype: torch.dtype
    ) -> None:
        self._memory = memory
        self._slot_bytes = slot_bytes
        self._layouts = list(layouts)
        shared: dict[ExpertLayout, dict[int, tuple[torch.Tensor, ...]]] = {}
        self._views = [shared.setdefault(layout, {}) for layout in layouts]
        self._compute_dtype = compute_dtype
        self._as_stored = [
            all(TORCH_DTYPES[part.dtype] == compute_dtype for part in layout.parts) for layout in layouts
        ]

    def parts(self, layer: int, slot: int) -> tuple[torch.Tensor, ...]:
        """The parts of the expert of MoE layer `layer` that is in `slot`, in the compute dtype."""
        views = self._views[layer].get(slot)
        if views is None:
            views = self._views[layer][slot] = self._make(self._layouts[layer], slot)
        if self._as_stored[layer]:
            return views
        return tuple(view.to(self._compute_dtype) for view in views)

    def _make(self, layout: ExpertLayout, slot: int) -> tuple[torch.Tensor, ...]:
        start = slot * self._slot_bytes
        return tuple(
            torch.frombuffer(
                self._memory,
                dtype=TORCH_DTYPES[part.dtype],
                count=part.nbytes // TORCH_DTYPES[part.dtype].itemsize,
                offset=start + part.offset,
            ).view(part.shape)
            for part in layout.parts
        )
