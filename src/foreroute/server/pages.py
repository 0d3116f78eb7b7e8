"""The page at / and what it is fed with: static files of ours, and nothing from anywhere else."""

from collections.abc import Callable
from functools import cache
from importlib.resources import files

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from foreroute.server.backend import Backend
from foreroute.server.live import LiveFeed
from foreroute.server.problems import ApiError
from foreroute.server.settings import ServerSettings

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Nothing is loaded from, sent to or shown in another place, and no script runs that is not a file of ours.
_SAFE = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_page(app: Starlette, backend: Backend, settings: ServerSettings) -> None:
    """Add the page, its files and GET /live to the server; nothing where the settings allow no page."""
    if settings.allow_pages:
        app.router.routes.extend(page_routes(lambda: _feed_of(backend, settings)))


def page_routes(feed: Callable[[], LiveFeed]) -> list[BaseRoute]:
    """The routes; `feed` gives the model's feed, or raises an ApiError while there is none."""

    async def live(request: Request) -> Response:
        found = feed()
        if found.is_full:
            raise ApiError(429, "Too many pages watch this server already. Close one.", headers={"Retry-After": "10"})
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"}
        return StreamingResponse(found.events(), media_type="text/event-stream", headers=headers)

    async def front(request: Request) -> Response:
        return _file("index.html")

    async def part(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _names():
            raise ApiError(404, "The page has no such file.")
        return _file(name)

    return [Route("/", front), Route("/page/{name}", part), Route("/live", live)]


def _feed_of(backend: Backend, settings: ServerSettings) -> LiveFeed:
    """The feed of the model that answers, made when it is first asked for, and kept beside the model."""
    serving = backend.serving(settings.retry_after_s)
    if serving.model is None:
        raise ApiError(404, "There is no engine here to watch.")
    handle = serving.model.foreroute
    feed: LiveFeed | None = getattr(handle, "live_feed", None)
    if feed is None:
        feed = handle.live_feed = LiveFeed(
            handle.runtime,
            handle.plan,
            settings.served_names[0],
            policy=lambda: str(handle.policies[0]),
            has_chat=serving.prompts.template is not None,
            is_over=lambda: backend.phase == "stopping",
        )
    return feed


def _file(name: str) -> Response:
    kind = _KINDS[name[name.rindex(".") :]]
    return Response(_content(name), media_type=kind, headers=_SAFE)


@cache
def _content(name: str) -> bytes:
    return (files("foreroute.server") / "page" / name).read_bytes()


@cache
def _names() -> frozenset[str]:
    """What may be asked for, so that a path leads nowhere else."""
    return frozenset(
        one.name for one in (files("foreroute.server") / "page").iterdir() if one.name.endswith(tuple(_KINDS))
    )
