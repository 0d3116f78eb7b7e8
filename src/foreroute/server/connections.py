"""Connections that are not left open for ever by who sends nothing, or a letter now and then (slowloris).

uvicorn closes a connection that is idle after an answer, and the guard gives a body its time. Nobody minds a request
whose first lines never end, what trickles in after an answer, or an answer that is never fetched: these do.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from foreroute.server.settings import Limits


def patient(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's protocol for HTTP, with an end to its patience.

    Args:
        limits: head_s is how long a request's first lines may take, send_s how long what was sent may lie unread.
    """

    class Patient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        """One connection. Its timer runs while no request is being answered."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(limits.head_s, self._end_patience)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            # Before anything else: a request that lies there already is begun in there.
            self._timer.cancel()
            self._timer = self.loop.call_later(limits.head_s, self._end_patience)
            super().on_response_complete()

        def _end_patience(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                return
            self.transport.close()
            self._await_reader(self.transport.get_write_buffer_size())

        def _await_reader(self, unread: int) -> None:
            """What is closed waits for its reader; one who has taken nothing since is not waited for."""

            def look() -> None:
                now = self.transport.get_write_buffer_size()
                if now and now >= unread:
                    self.transport.abort()
                elif now:
                    self._await_reader(now)

            if unread:
                self._timer = self.loop.call_later(limits.send_s, look)

    return Patient
