"""The page at / and what it is fed with: static files of ours, and nothing from anywhere else."""

from functools import cache
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from foreroute.server.live import LiveFeed

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


def page_routes(feed: LiveFeed) -> list[BaseRoute]:
    """Routes of the page, its files, and GET /live; leave them out for --no-ui."""

    async def live(request: Request) -> Response:
        if feed.is_full:
            return _refusal(429, "Too many pages watch this server already. Close one of them.", {"Retry-After": "10"})
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"}
        return StreamingResponse(feed.events(), media_type="text/event-stream", headers=headers)

    async def front(request: Request) -> Response:
        return _file("index.html")

    async def part(request: Request) -> Response:
        name = request.path_params["name"]
        return _file(name) if name in _names() else _refusal(404, f"The page has no file {name!r}.", {})

    return [Route("/", front), Route("/page/{name}", part), Route("/live", live)]


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


def _refusal(status: int, message: str, headers: dict[str, str]) -> Response:
    error: dict[str, Any] = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)
