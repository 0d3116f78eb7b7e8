"""Close connections of clients that send nothing, or send or read very slowly (slowloris).

uvicorn closes a connection that is idle after an answer, and the guard limits the time of a body. What they leave open
is limited here: a request whose head never ends, bytes that trickle in after an answer, an answer that is not read,
and how many connections wait for a request, as each takes a descriptor.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from foreroute.server.settings import Limits

# A client that reads less in send_s, without reading all that is left, counts as not reading.
_LEAST_BYTES = 2**14


class _Patient(H11Protocol):
    """An HTTP protocol with a timeout for the next request's head, and one for a client that does not read.

    Of h11, always: httptools, which uvicorn prefers where it is installed, takes the body of a request with `Upgrade:
    h2c` (Java's clients send it with the first one) for the other protocol's.
    """

    limits: Limits
    # Connections without a request, the one that has waited longest first; of all of one server.
    waiting: dict["_Patient", None]
    _reader_timer: asyncio.TimerHandle | None = None
    _is_idle = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.limits.head_s, self._end_patience)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self.waiting.pop(self, None)
        self._forget_reader()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # A kept connection may be idle for longer; the request that ends this has its own time.
        if self._is_idle:
            self._is_idle = False
            self._restart()
        super().data_received(data)
        if self._is_answering:
            self.waiting.pop(self, None)

    def on_response_complete(self) -> None:
        # First of all: the next call may begin a request that has already arrived.
        self._restart(self.limits.idle_s)
        self._is_idle = True
        self._wait()
        super().on_response_complete()
        if self._is_answering:
            self.waiting.pop(self, None)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        # A closed connection keeps the timer until nothing is left to send.
        if not self.transport.is_closing():
            self._forget_reader()
        super().resume_writing()

    def _restart(self, within_s: float | None = None) -> None:
        self._timer.cancel()
        self._timer = self.loop.call_later(within_s or self.limits.head_s, self._end_patience)

    def _end_patience(self) -> None:
        if self._is_answering and not self.transport.is_closing():
            # The answer is still running: check again later.
            self._restart()
            return
        self._close()

    @property
    def _is_answering(self) -> bool:
        cycle: Any = self.cycle  # None before the first request
        return cycle is not None and not cycle.response_complete

    def _wait(self) -> None:
        """Count it as the last of those that wait for a request, and close the first where they are too many."""
        self.waiting.pop(self, None)
        self.waiting[self] = None
        if len(self.waiting) > self.limits.idle_connections:
            first = next(iter(self.waiting))
            del self.waiting[first]
            first._close()

    def _close(self) -> None:
        self.transport.close()
        self._await_reader()

    def _await_reader(self) -> None:
        """Check after some time whether the unread data has shrunk, so that unread answers do not wait for ever."""
        if self._reader_timer is None:
            unread = self.transport.get_write_buffer_size()
            self._reader_timer = self.loop.call_later(self.limits.send_s, self._look, unread)

    def _look(self, before: int) -> None:
        self._reader_timer = None
        unread = self.transport.get_write_buffer_size()
        if unread and before - unread < _LEAST_BYTES:
            self.transport.abort()
        elif unread:
            self._await_reader()

    def _forget_reader(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None


def patient(limits: Limits) -> type[asyncio.Protocol]:
    """Make uvicorn's HTTP protocol with timeouts.

    Args:
        limits: head_s bounds the arrival of a request's head, send_s how long sent data may stay unread,
            idle_connections how many wait for a request.
    """
    return type("Patient", (_Patient,), {"limits": limits, "waiting": {}})
