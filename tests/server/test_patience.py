"""Who is taken for a reader and who is not, by what is left unread at one look and at the next."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from foreroute.server.connections import patient
from foreroute.server.settings import Limits

SEND_S = 0.02


class _Transport(asyncio.Transport):
    """Unread bytes as they are set; remembers whether it was closed and cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.unread, self.is_closed, self.is_cut, self.looks = 0, False, False, 0

    def get_write_buffer_size(self) -> int:
        self.looks += 1
        return self.unread

    def is_closing(self) -> bool:
        return self.is_closed or self.is_cut

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_cut = True


async def _cut_off(unread: list[int], *, is_closed: bool, resumes_at: int | None = None) -> int | None:
    """The look at which a connection is cut off whose buffer holds `unread`; None: at none of them.

    resumes_at: before which look the buffer is small enough for more to be written.
    """
    transport = _Transport()
    config = uvicorn.Config(lambda *_: None, log_level="critical")
    made: Any = patient(Limits(send_s=SEND_S, head_s=1000))
    protocol = made(config, ServerState(), {})
    protocol.connection_made(transport)
    protocol.cycle = SimpleNamespace(response_complete=False, message_event=asyncio.Event(), disconnected=False)
    transport.unread, transport.is_closed = unread[0], is_closed
    protocol.pause_writing()
    cut_at = None
    for at, left in enumerate(unread[1:], 1):
        transport.unread = left
        if at == resumes_at:
            protocol.resume_writing()
        looks = transport.looks
        # Where a look is due, wait for it; it asks again where it goes on.
        waited = 0
        while protocol._reader_timer is not None and transport.looks == looks and waited < 500:
            await asyncio.sleep(SEND_S / 4)
            waited += 1
        if transport.is_cut:
            cut_at = at
            break
    protocol.connection_lost(None)
    assert protocol._reader_timer is None
    return cut_at


@pytest.mark.parametrize(
    ("unread", "is_closed", "resumes_at", "expected"),
    [
        ([100_000, 100_000], False, None, 1),
        ([100_000, 100_000], True, None, 1),
        ([100_000, 80_000, 50_000, 50_000], False, None, 3),
        # A byte now and then.
        ([100_000, 99_000], False, None, 1),
        # Read far enough for more to be written: no timer runs.
        ([100_000, 15_000, 15_000, 15_000], False, 1, None),
        # The same, with an answer that is over or cancelled: the rest is waited for, not for ever.
        ([100_000, 15_000, 15_000], True, 1, 2),
        ([100_000, 15_000, 0], True, 1, None),
    ],
)
def test_who_is_cut_off(unread: list[int], is_closed: bool, resumes_at: int | None, expected: int | None) -> None:
    assert asyncio.run(_cut_off(unread, is_closed=is_closed, resumes_at=resumes_at)) == expected
