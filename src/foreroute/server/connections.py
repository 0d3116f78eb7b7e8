"""Connections that are not left open for ever by who sends nothing, or a letter now and then (slowloris).

uvicorn closes a connection that is idle after an answer, and the guard gives a body its time. Nobody minds a request
whose first lines never end, what trickles in after an answer, or an answer that is never fetched: these do.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from foreroute.server.settings import Limits

# Who takes less in send_s, and not all that is left either, does not read: a byte now and then is not reading.
_LEAST_BYTES = 2**14


class _Patient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """One connection. One timer waits for the next request, another for who does not read."""

    limits: Limits
    _reader_timer: asyncio.TimerHandle | None = None
    _is_idle = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.limits.head_s, self._end_patience)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._forget_reader()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # A kept connection may lie idle nearly as long: the request that ends this has all of its time.
        if self._is_idle:
            self._is_idle = False
            self._restart()
        super().data_received(data)

    def on_response_complete(self) -> None:
        # Before anything else: a request that lies there already is begun in there.
        self._restart()
        self._is_idle = True
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        # What is closed is waited for until nothing is left of it.
        if not self.transport.is_closing():
            self._forget_reader()
        super().resume_writing()

    def _restart(self) -> None:
        self._timer.cancel()
        self._timer = self.loop.call_later(self.limits.head_s, self._end_patience)

    def _end_patience(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering and not self.transport.is_closing():
            # An answer that is given up has no other end: it is looked for again.
            self._restart()
            return
        self.transport.close()
        self._await_reader()

    def _await_reader(self) -> None:
        """Look after some time at what is unread now; nobody's next answer waits for ever for it to be read."""
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
    """uvicorn's protocol for HTTP, with an end to its patience.

    Args:
        limits: head_s is how long a request's first lines may take, send_s how long what was sent may lie unread.
    """
    return type("Patient", (_Patient,), {"limits": limits})
