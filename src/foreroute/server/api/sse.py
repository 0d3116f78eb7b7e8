"""Server-sent events over ASGI: sent as they arrive, with comments while idle, ended when the client is gone."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from foreroute.server.api.problems import ApiError, internal
from foreroute.server.settings import ServerSettings

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True)
class StreamForm:
    """How an API writes its streams.

    idle: sent while nothing comes. last: sent at the end. problem: the event of an error. is_named: events have their
    `type` as their name, too.
    """

    idle: bytes = b": keep-alive\n\n"
    last: bytes = DONE
    problem: Callable[[ApiError], dict[str, Any]] = lambda error: error.body
    is_named: bool = False


def event(body: dict[str, Any], *, is_named: bool = False) -> bytes:
    """Format one event with a JSON object.

    Raises:
        ValueError: it has a number that JSON lacks.
    """
    text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    name = f"event: {body['type']}\n" if is_named else ""
    return f"{name}data: {text}\n\n".encode()


class UntilGone(Response):
    """A response that is streamed until it is complete, or its client has left or stopped reading."""

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Send everything, or stop when the client has left; scope, receive, send: see ASGI."""
        tasks = asyncio.ensure_future(self.send_all(send)), asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.end()
            for task in tasks:
                task.cancel()
            # A reader that is too slow is treated as gone.
            for task in tasks:
                with suppress(asyncio.CancelledError, asyncio.TimeoutError, OSError):
                    await task

    async def send_all(self, send: Callable[[MutableMapping[str, Any]], Awaitable[None]]) -> None:
        """Send the head and all parts."""
        raise NotImplementedError

    def end(self) -> None:
        """Clean up; called once, however the response ends."""
        raise NotImplementedError


async def until_gone(receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(UntilGone):
    """An answer made of events.

    Args:
        events: what to send. Any error that it raises is sent as an event too; the form's end follows in any case.
        settings: keep_alive_s, and how long sent data may stay unread.
        on_end: called at the end, also when the client left before the first event was requested.
        form: the API's.
    """

    def __init__(
        self,
        events: AsyncIterator[dict[str, Any]],
        settings: ServerSettings,
        on_end: Callable[[], None],
        form: StreamForm | None = None,
    ) -> None:
        super().__init__()
        self._events, self._settings, self._on_end, self._form = events, settings, on_end, form or StreamForm()

    def end(self) -> None:
        """See `UntilGone`."""
        self._on_end()

    async def send_all(self, send: Callable[[MutableMapping[str, Any]], Awaitable[None]]) -> None:
        """See `UntilGone`."""

        async def push(part: bytes, *, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": part, "more_body": more}
            await asyncio.wait_for(send(message), self._settings.limits.send_s)

        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        coming = aiter(self._events)
        following: asyncio.Future[dict[str, Any]] | None = None
        try:
            while True:
                following = asyncio.ensure_future(_next(coming))
                # Keep waiting on the same future: a comment must not lose an event.
                while not (await asyncio.wait({following}, timeout=self._settings.keep_alive_s))[0]:
                    await push(self._form.idle)
                try:
                    await push(event(following.result(), is_named=self._form.is_named))
                except StopAsyncIteration:
                    break
        except ApiError as error:
            await push(event(self._form.problem(error), is_named=self._form.is_named))
        except (asyncio.TimeoutError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - the stream has begun: the error goes into it
            await push(event(self._form.problem(internal(error)), is_named=self._form.is_named))
        finally:
            if following is not None and not following.done():
                following.cancel()
                with suppress(asyncio.CancelledError):
                    await following
            close = getattr(coming, "aclose", None)
            if close is not None:
                await close()
        await push(self._form.last, more=False)


async def _next(coming: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    return await anext(coming)
