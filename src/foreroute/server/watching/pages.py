"""Serve the page at / and its feed: static files of this package alone."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from functools import cache
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from foreroute.server.api.problems import ApiError
from foreroute.server.api.sse import UntilGone
from foreroute.server.backend import Backend
from foreroute.server.settings import ServerSettings
from foreroute.server.watching.live import LiveFeed

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Load from, send to and embed in no other site, and run no scripts but files of this package.
_SAFE = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


_EVENTS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}


def add_page(app: Starlette, backend: Backend, settings: ServerSettings) -> None:
    """Add the page, its files and the GET /live of `backend` to the `app`; nothing where `settings` allow no page."""
    if settings.allow_pages:
        app.router.routes.extend(page_routes(lambda: _feed_of(backend, settings), settings.limits.send_s))


def page_routes(feed: Callable[[], LiveFeed], send_s: float) -> list[BaseRoute]:
    """Make the routes.

    Args:
        feed: returns the model's feed, or raises an ApiError while there is none.
        send_s: how long sent data may stay unread by a viewer.
    """

    async def live(request: Request) -> Response:
        # Browsers tell which site's page asks: no other site may watch, or use up the viewers' places.
        if any(site.lower() not in ("same-origin", "none") for site in request.headers.getlist("sec-fetch-site")):
            raise ApiError(403, "Pages of other sites may not watch this server.", code="wrong_origin")
        found = feed()
        if request.method == "HEAD":
            return Response(headers=_EVENTS)
        if not found.enter():
            raise ApiError(429, "Too many pages watch this server already. Close one.", headers={"Retry-After": "10"})
        return _Watching(found, send_s)

    async def front(request: Request) -> Response:
        return _file("index.html")

    async def part(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _names():
            raise ApiError(404, "The page has no such file.")
        return _file(name)

    return [Route("/", front), Route("/page/{name}", part), Route("/live", live)]


class _Watching(UntilGone):
    """Streams the feed to a viewer who has entered, who is removed however this ends.

    Args:
        send_s: a viewer who leaves sent data unread for longer is disconnected.
    """

    def __init__(self, feed: LiveFeed, send_s: float) -> None:
        super().__init__(headers=_EVENTS)
        del self.headers["content-length"]
        self._feed, self._send_s = feed, send_s

    def end(self) -> None:
        """See `UntilGone`."""
        self._feed.leave()

    async def send_all(self, send: Callable[[MutableMapping[str, Any]], Awaitable[None]]) -> None:
        """Send events until the server stops."""

        async def push(body: bytes, *, more: bool = True) -> None:
            await asyncio.wait_for(send({"type": "http.response.body", "body": body, "more_body": more}), self._send_s)

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._feed.events():
            await push(event)
        await push(b"", more=False)


def _feed_of(backend: Backend, settings: ServerSettings) -> LiveFeed:
    """Return the loaded model's feed, made on first use and kept beside the model."""
    serving = backend.serving()
    if serving.model is None:
        raise ApiError(404, "There is no engine here to watch.")
    handle = serving.model.foreroute
    if serving.live_feed is None:
        serving.live_feed = LiveFeed(
            handle.host_engine,
            handle.plan,
            settings.served_names[0],
            policy=lambda: str(handle.policies[0]),
            has_chat=serving.prompts.template is not None,
            is_over=lambda: backend.phase == "stopping",
            is_running=lambda: serving.engine.state().running > 0,
        )
    return serving.live_feed


def _file(name: str) -> Response:
    kind = _KINDS[name[name.rindex(".") :]]
    return Response(_content(name), media_type=kind, headers=_SAFE)


@cache
def _content(name: str) -> bytes:
    return (files("foreroute.server") / "page" / name).read_bytes()


@cache
def _names() -> frozenset[str]:
    """Names that may be requested, so that no path leads outside."""
    return frozenset(
        one.name for one in (files("foreroute.server") / "page").iterdir() if one.name.endswith(tuple(_KINDS))
    )
