"""Memory that the graphs of experts work on: the pool's slots, and what lies between products."""

import mmap

import numpy as np
import torch

from foreroute.kernels.ggml.types import F32, TYPE_NUMBERS
from foreroute.types import SlotClass

# ggml's types of floats -> torch's.
FLOATS = {F32: torch.float32, TYPE_NUMBERS["F16"]: torch.float16, TYPE_NUMBERS["BF16"]: torch.bfloat16}


class HostSlots:
    """The pool's slots of one length: slot s, of those below `num_slots`, begins `s * slot_bytes` after `address`.

    Args:
        memory: the whole pool's, kept as long as this object. slots: those of this length.
    """

    def __init__(self, memory: mmap.mmap | torch.Tensor, slots: SlotClass) -> None:
        self._bytes = memory if isinstance(memory, torch.Tensor) else torch.frombuffer(memory, dtype=torch.uint8)
        self._slots = slots
        # Slots of other lengths may lie before them: their numbers never become ids here.
        self.address = self._bytes.data_ptr() + slots.start
        self.slot_bytes, self.num_slots = slots.slot_bytes, slots.first + slots.num_slots

    def stored(self, slot: int, offset: int, nbytes: int) -> torch.Tensor:
        """The bytes at an offset in a slot."""
        start = self._slots.offset(slot) + offset
        return self._bytes[start : start + nbytes]

    def floats(self, slot: int, offset: int, count: int, number: int) -> torch.Tensor:
        """The `count` numbers of ggml's type `number` at an offset in a slot, in f32."""
        dtype = FLOATS[number]
        return self.stored(slot, offset, dtype.itemsize * count).view(dtype).float()


class Scratch:
    """Memory between products, by name, for as many numbers as any graph has had; `generation` rises when it moves."""

    def __init__(self) -> None:
        self.generation = 0
        self._arrays: dict[str, np.ndarray] = {}

    def reserve(self, name: str, count: int) -> bool:
        """Have room for `count` floats; whether that is new memory."""
        if name in self._arrays and self._arrays[name].size >= count:
            return False
        self._arrays[name] = np.empty(count, dtype=np.float32)
        self.generation += 1
        return True

    def address(self, name: str) -> int:
        """Where this memory is now."""
        return int(self._arrays[name].ctypes.data)

    def array(self, name: str, rows: int, width: int) -> np.ndarray:
        """This memory as [rows, width]."""
        return self._arrays[name][: rows * width].reshape(rows, width)

    def tensor(self, name: str, rows: int, width: int) -> torch.Tensor:
        """This memory as [rows, width]."""
        return torch.from_numpy(self.array(name, rows, width))
