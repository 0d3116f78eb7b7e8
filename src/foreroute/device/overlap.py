"""Copies beside compute: work on a side stream, and a prompt's two buffers, one loaded while the other is computed.

A side stream is captured by a graph as a branch; on the CPU its work is deferred until it is joined.

The buffers hold a layer each. The pool of slots is not used, so that a long prompt does not evict the experts that
decoding needs; the experts that the prompt used most are put into it afterwards (device/tier.py).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.kernels.slot_views import SlotViews
from foreroute.kernels.torch.experts import ExpertMath
from foreroute.kernels.torch.layer import group_by_expert

# From this share of used experts, the next layer is copied as a whole, ahead of its use.
_WHOLE_LAYER_FROM = 0.5


class Branch(Protocol):
    """Runs one piece of work at a time concurrently with the main stream."""

    def fork(self, work: Callable[[], None]) -> None:
        """Run `work` after all work launched so far on the main stream, concurrently with what follows."""

    def join(self) -> None:
        """Order the main stream's next work after the forked work. Does nothing without any."""


class LateBranch:
    """On the CPU: runs forked work when it is joined, as late as allowed, so that tests notice a missing join."""

    def __init__(self) -> None:
        self._work: Callable[[], None] | None = None

    def fork(self, work: Callable[[], None]) -> None:
        """Keep `work` for `join`."""
        assert self._work is None, "the last piece of work has not been joined"
        self._work = work

    def join(self) -> None:
        """Run the kept work."""
        work, self._work = self._work, None
        if work is not None:
            work()


class StreamBranch:
    """On a GPU: a side stream. Never blocks the host, and can be captured in a graph."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._is_forked = False

    def fork(self, work: Callable[[], None]) -> None:
        """Launch `work` on the side stream, behind the current stream's work."""
        assert not self._is_forked, "the last piece of work has not been joined"
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        self._is_forked = True

    def join(self) -> None:
        """Make the current stream wait for the side stream."""
        if self._is_forked:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._is_forked = False


def branch_of(device: torch.device) -> Branch:
    """Make the branch for a device."""
    return StreamBranch(device) if device.type == "cuda" else LateBranch()


class LayerBuffers:
    """Computes a layer's experts for many tokens.

    Args:
        arena: uint8 [experts of all layers, record bytes], in the order of keys, pinned where the device is a GPU.
        first_records: per MoE layer the record of its expert 0.
        math: one per MoE layer. dtype: of compute.

    Attributes:
        uses: int64 [layers, experts] on the device: how often each was routed to since `forget`.
        whole_layers, single_experts: copies of either kind so far.
    """

    def __init__(
        self,
        table: ExpertTable,
        arena: torch.Tensor,
        first_records: Sequence[int],
        math: Sequence[ExpertMath],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._arena: torch.Tensor | None = arena
        self._first_records = list(first_records)
        self._widths = [layer.num_experts for layer in table.layers]
        self._math = list(math)
        widest = max(self._widths)
        self._buffers = [torch.empty(widest, table.slot_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        layouts = [layer.layout for layer in table.layers]
        self._views = [SlotViews(buffer.view(-1), table.slot_bytes, layouts, math, dtype) for buffer in self._buffers]
        self._branch = branch_of(device)
        self._coming = -1  # the layer being copied as a whole
        self.uses = torch.zeros(len(table.layers), widest + 1, dtype=torch.int64, device=device)
        self.whole_layers = self.single_experts = 0

    def begin(self) -> None:
        """Begin a forward pass: wait for a layer copied ahead for an earlier pass, and discard it."""
        self._branch.join()
        self._coming = -1

    def compute(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute `layer`'s weighted sum [tokens, hidden]; ids, weights: [tokens, k]. Waits for the ids on the host."""
        width, at = self._widths[layer], layer % 2
        is_expert = (ids >= 0) & (ids < width)
        counts = torch.where(is_expert, ids, len(self.uses[layer]) - 1).flatten()
        self.uses[layer].scatter_add_(0, counts, torch.ones_like(counts))
        used = torch.unique(ids[is_expert]).tolist()
        self._branch.join()
        if self._coming != layer:
            self._copy_some(layer, used)
        following = layer + 1
        if following < len(self._widths) and len(used) >= _WHOLE_LAYER_FROM * width:
            # Its buffer was last read by the layer before this one, which is already launched on the main stream.
            self._branch.fork(lambda: self._copy_whole(following))
            self._coming = following
        total = torch.zeros_like(hidden)
        for expert, tokens, positions in group_by_expert(ids, used, 0):
            outputs = self._math[layer](hidden[tokens], self._views[at].operands(layer, expert))
            total.index_add_(0, tokens, (outputs * weights[tokens, positions, None]).to(total.dtype))
        return total

    def forget(self) -> None:
        """Reset the counts of uses."""
        self.uses.zero_()

    def close(self) -> None:
        """Drop all references to the memory."""
        self.begin()
        for views in self._views:
            views.clear()
        self._buffers.clear()
        self._arena = None

    def _copy_whole(self, layer: int) -> None:
        assert self._arena is not None, "the buffers have been closed"
        first, width = self._first_records[layer], self._widths[layer]
        self._buffers[layer % 2][:width].copy_(self._arena[first : first + width], non_blocking=True)
        self.whole_layers += 1

    def _copy_some(self, layer: int, experts: Sequence[int]) -> None:
        assert self._arena is not None, "the buffers have been closed"
        for expert in experts:
            record = self._arena[self._first_records[layer] + expert]
            self._buffers[layer % 2][expert].copy_(record, non_blocking=True)
        self.single_experts += len(experts)
