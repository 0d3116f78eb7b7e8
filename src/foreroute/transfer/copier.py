"""Copies from an arena into slots: in memory, or over a link to a CUDA device on a stream of their own."""

import torch


class MemoryCopier:
    """Slots in the same memory: a copy is over when it has begun.

    Args:
        arena: uint8 [records, record bytes]. slots: uint8 [slots, slot bytes], records as long as slots.
    """

    def __init__(self, arena: torch.Tensor, slots: torch.Tensor) -> None:
        self._arena: torch.Tensor | None = arena
        self._slots: torch.Tensor | None = slots

    def start(self, record: int, slot: int) -> None:
        """Copy."""
        assert self._arena is not None, "the copier is closed"
        assert self._slots is not None, "the copier is closed"
        self._slots[slot].copy_(self._arena[record])

    def is_done(self, ticket: None) -> bool:
        """It is."""
        return True

    def wait(self, ticket: None) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Let go of the memory."""
        self._arena = self._slots = None


class CudaCopier:
    """Slots on a GPU: cudaMemcpyAsync from pinned memory, on a side stream, an event after each copy.

    A slot that was given up may still be read by kernels that wait in the compute stream: a copy starts after all that
    stands there when it is asked for.

    Args:
        arena: uint8 [records, record bytes], pinned. slots: uint8 [slots, slot bytes] on the device.
    """

    def __init__(self, arena: torch.Tensor, slots: torch.Tensor) -> None:
        self._arena: torch.Tensor | None = arena
        self._slots: torch.Tensor | None = slots
        self._device = slots.device
        self._stream = torch.cuda.Stream(slots.device)

    def start(self, record: int, slot: int) -> torch.cuda.Event:
        """Queue the copy and an event behind it."""
        assert self._arena is not None, "the copier is closed"
        assert self._slots is not None, "the copier is closed"
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._slots[slot].copy_(self._arena[record], non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def is_done(self, ticket: torch.cuda.Event) -> bool:
        """Whether the event has passed: kernels that are launched from now on find the bytes."""
        return bool(ticket.query())

    def wait(self, ticket: torch.cuda.Event) -> None:
        """Block until the event has passed."""
        ticket.synchronize()

    def close(self) -> None:
        """Wait for the stream, and let go of the memory."""
        self._stream.synchronize()
        self._arena = self._slots = None
