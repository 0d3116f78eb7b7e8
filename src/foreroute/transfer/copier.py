"""Copy experts from an arena into slots: within host memory, or to a CUDA device on a side stream."""

import torch


class MemoryCopier:
    """Copies into slots in host memory, synchronously.

    Args:
        arena: uint8 [records, record bytes]. slots: uint8 [slots, slot bytes], records as long as slots.
    """

    def __init__(self, arena: torch.Tensor, slots: torch.Tensor) -> None:
        self._arena: torch.Tensor | None = arena
        self._slots: torch.Tensor | None = slots

    def start(self, record: int, slot: int) -> None:
        """Copy `record` into `slot`."""
        assert self._arena is not None, "the copier is closed"
        assert self._slots is not None, "the copier is closed"
        self._slots[slot].copy_(self._arena[record])

    def is_done(self, ticket: None) -> bool:
        """True, as `start` copies synchronously."""
        return True

    def wait(self, ticket: None) -> None:
        """Do nothing, as `start` copies synchronously."""

    def close(self) -> None:
        """Drop the references to the memory."""
        self._arena = self._slots = None


class CudaCopier:
    """Copies into slots on a GPU: cudaMemcpyAsync from pinned memory on a side stream, with an event after each copy.

    Kernels queued in the compute stream may still read an evicted slot: a copy starts after all that is queued there
    when it is requested.

    Args:
        arena: uint8 [records, record bytes], pinned. slots: uint8 [slots, slot bytes] on the device.
    """

    def __init__(self, arena: torch.Tensor, slots: torch.Tensor) -> None:
        self._arena: torch.Tensor | None = arena
        self._slots: torch.Tensor | None = slots
        self._device = slots.device
        self._stream = torch.cuda.Stream(slots.device)

    def start(self, record: int, slot: int) -> torch.cuda.Event:
        """Queue a copy of `record` into `slot`; return the event behind it."""
        assert self._arena is not None, "the copier is closed"
        assert self._slots is not None, "the copier is closed"
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._slots[slot].copy_(self._arena[record], non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def is_done(self, ticket: torch.cuda.Event) -> bool:
        """Whether the copy is complete, for kernels launched from now on."""
        return bool(ticket.query())

    def wait(self, ticket: torch.cuda.Event) -> None:
        """Block until the copy is complete."""
        ticket.synchronize()

    def close(self) -> None:
        """Wait for the stream, and drop the references to the memory."""
        self._stream.synchronize()
        self._arena = self._slots = None
