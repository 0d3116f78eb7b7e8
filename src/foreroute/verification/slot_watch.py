"""Record what the kernels really read: the expert they ask for, the one loaded into its slot, and the bytes in it.

`SlotWatch` wraps the engine's transfer, each layer's kernels, and the views through which torch's read slots; ggml's
say themselves what they read. They pass every call on and record it, so that the engine's belief about a slot can be
compared with its content.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import xxhash

from foreroute.engine.moe_step import MoeStep
from foreroute.kernels.ggml.layer import GgmlLayer
from foreroute.kernels.layer import ExpertSlots, LayerKernels, Placed
from foreroute.kernels.slot_views import SlotViews
from foreroute.kernels.torch.layer import TorchLayer
from foreroute.transfer.base import Transfer

# Slot -> the tensors that kernels read of it.
Stored = Callable[[int], Iterable[torch.Tensor]]


class SlotUse(NamedTuple):
    """One expert as the kernels read it.

    computed_as: the key that it was computed as. loaded: the key that was last loaded into its slot, -1 for none.
    digest: of the slot's bytes at that moment, see `expert_digest`.
    """

    computed_as: int
    loaded: int
    digest: bytes


def digest(tensors: Iterable[torch.Tensor]) -> bytes:
    """Hash (xxh3-128) the bits of tensors of any shape [...], row-major, one after the other: -0.0 differs from 0.0."""
    hasher = xxhash.xxh3_128()
    for tensor in tensors:
        raw: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        hasher.update(raw)
    return hasher.digest()


def expert_digest(operands: Iterable[torch.Tensor]) -> bytes:
    """Hash one expert's parts ([rows, columns]) in layout order, the same for weights and their transposed views."""
    return digest(part if part.is_contiguous() else part.t() for part in operands)


class SlotWatch:
    """Watches the slots of an engine from now on; nothing may have been loaded before.

    Attributes:
        digests: key -> the bytes last used in a slot that was loaded for it.
    Cost: a hash of every expert that is computed, which reads its bytes once more.
    """

    def __init__(self, engine: MoeStep) -> None:
        self.digests: dict[int, bytes] = {}
        # By slot: the key that was last loaded into it, and the one that is computed from it.
        self.loaded: dict[int, int] = {}
        self.computed: dict[int, int] = {}
        self._uses: list[SlotUse] = []
        self._last = (-1, -1)
        engine.pool.transfer = cast(Transfer, _TransferFront(engine.pool.transfer, self))
        for views in {
            id(layer.views): layer.views for layer in engine.kernels if isinstance(layer, TorchLayer)
        }.values():
            self._watch_views(views)
        engine.kernels = [cast(LayerKernels, _KernelsFront(layer, self)) for layer in engine.kernels]

    def take(self) -> tuple[SlotUse, ...]:
        """Return the uses since the last call, in compute order."""
        uses, self._uses, self._last = tuple(self._uses), [], (-1, -1)
        return uses

    def note(self, slot: int, operands: Iterable[torch.Tensor]) -> None:
        """Record that a kernel has read these operands (as for `expert_digest`, [rows, columns] each) from `slot`."""
        computed_as, loaded = self.computed[slot], self.loaded.get(slot, -1)
        # A family's own forward asks once for each part.
        if (computed_as, slot) == self._last:
            return
        self._last = (computed_as, slot)
        self._uses.append(SlotUse(computed_as, loaded, expert_digest(operands)))
        self.digests[loaded] = self._uses[-1].digest

    def _watch_views(self, views: SlotViews) -> None:
        read = views.operands

        def operands(layer: int, slot: int) -> tuple[torch.Tensor, ...]:
            found = read(layer, slot)
            self.note(slot, views.as_family(layer, found))
            return found

        setattr(views, "operands", operands)  # noqa: B010  a method of this one object


class _Front:
    """Passes on all calls that a subclass does not record."""

    def __init__(self, behind: Any, watch: SlotWatch) -> None:
        self._behind = behind
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)

    def __repr__(self) -> str:
        return repr(self._behind)


class _TransferFront(_Front):
    def demand(self, key: int, slot: int) -> None:
        self._watch.loaded[slot] = key
        self._behind.demand(key, slot)

    def prefetch(self, key: int, slot: int) -> None:
        self._watch.loaded[slot] = key
        self._behind.prefetch(key, slot)

    def defer(self, key: int, slot: int) -> None:
        self._watch.loaded[slot] = key
        self._behind.defer(key, slot)


class _KernelsFront(_Front):
    def begin(self, *step: Any) -> Any:
        return _SumFront(self._behind.begin(*step), self._watch, self._stored)

    def stream(self, experts: ExpertSlots, *step: Any) -> torch.Tensor:
        total: torch.Tensor = self._behind.stream(_SlotsFront(experts, self._watch, self._stored), *step)
        return total

    @property
    def _stored(self) -> Stored | None:
        return self._behind.stored if isinstance(self._behind, GgmlLayer) else None


class _Reading(_Front):
    """Records what is read of a slot before it is: `stored` says it, or None where views do."""

    def __init__(self, behind: Any, watch: SlotWatch, stored: Stored | None) -> None:
        super().__init__(behind, watch)
        self._stored = stored

    def _asks(self, key: int, slot: int) -> None:
        self._watch.computed[slot] = key
        if self._stored is not None:
            self._watch.note(slot, self._stored(slot))


class _SumFront(_Reading):
    def add(self, experts: Sequence[Placed]) -> None:
        for key, slot in experts:
            self._asks(key, slot)
        self._behind.add(experts)


class _SlotsFront(_Reading):
    def slot_of(self, key: int) -> int:
        slot: int = self._behind.slot_of(key)
        self._asks(key, slot)
        return slot

    def resident(self, keys: Sequence[int]) -> dict[int, int]:
        found: dict[int, int] = self._behind.resident(keys)
        for key, slot in found.items():
            self._asks(key, slot)
        return found
