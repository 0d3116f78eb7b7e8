"""Check every request before any route: host, origin, key, and a body that is JSON of limited size.

It wraps the whole application, so that no spelling of a path ("//v1", "/V1", "%2f") bypasses it.
"""

import asyncio
import base64
import binascii
import hmac
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from foreroute.server.api.problems import RETRY_SOON, ApiError, internal
from foreroute.server.bodies import plain_body
from foreroute.server.settings import ServerSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# The port that may follow a name in the Host header.
_HOST = re.compile(r":[0-9]*\Z")
# Health checks need no key; everything else does.
_OPEN_PATH = "/health"
_ONCE = (b"host", b"authorization", b"x-api-key", b"content-type", b"content-length", b"origin")
# A larger body is parsed in a thread, so that the event loop keeps serving others.
_SMALL_BYTES = 2**18


class Guard:
    """ASGI middleware; see the module.

    Args:
        app: the application behind it. settings: keys, hosts and limits.
    """

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self._app = app
        self._hosts, self._named = settings.hosts, settings.allowed_hosts
        self._keys = [key.encode() for key in settings.api_keys]
        self._limits = settings.limits
        self._in_flight = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Let the request through, or refuse it; scope, receive, send: see ASGI."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._in_flight += 1
        try:
            await self._guarded(scope, receive, send)
        finally:
            self._in_flight -= 1

    async def _guarded(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        try:
            headers = _single_headers(scope)
            if b"transfer-encoding" in headers and b"content-length" in headers:
                # A proxy may see the request's end elsewhere, and take what follows for a request that it has approved.
                raise ApiError(400, "Content-Length and Transfer-Encoding are both there.", code="invalid_header")
            self._check_host(headers)
            self._check_key(scope, headers)
            if self._in_flight > self._limits.in_flight and scope["path"] != _OPEN_PATH:
                why = "Too many requests are being served."
                raise ApiError(503, why, code="too_many_requests", headers=RETRY_SOON)
            if scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
                body = await self._read_body(headers, receive)
                if body is None:
                    return
                receive = _replay(body, receive)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        await self._answer(scope, receive, send)

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        has_started = False

        async def watched(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:  # noqa: BLE001 - the last handler: the server itself must log nothing
            # Once an answer has begun, the app has logged the error, and still raises it.
            if not has_started:
                await internal(error).response(scope["path"])(scope, receive, send)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        # DNS rebinding: a page of another site, whose name now resolves to this server, still sends that name.
        if self._hosts is not None and _HOST.sub("", host) not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            message = f"The Host header must be one of {known}. Behind a proxy: foreroute serve --allowed-host NAME."
            raise ApiError(403, message, code="wrong_host")
        origin = headers.get(b"origin")
        # A proxy may replace Host by its own name for this server; Origin has the name that people use.
        if origin is not None and _host_of(origin) not in {host, *self._named}:
            raise ApiError(403, "Pages of other origins may not use this server.", code="wrong_origin")

    def _check_key(self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes]) -> None:
        if not self._keys or (scope["path"] == _OPEN_PATH and scope["method"] in ("GET", "HEAD")):
            return
        # OpenAI's clients send the one, Anthropic's the other.
        given = [_key_in(headers.get(b"authorization", b""))]
        given += [headers[b"x-api-key"]] if b"x-api-key" in headers else []
        # Compare with all keys, always: timing must show neither their number nor a near match.
        if not any([hmac.compare_digest(one, key) for one in given for key in self._keys]):  # noqa: C419
            wants_page = b"text/html" in headers.get(b"accept", b"")
            # A browser asks the user for the key (as a password); programs send it as a bearer token.
            challenge = 'Basic realm="foreroute", charset="UTF-8"' if wants_page else "Bearer"
            raise ApiError(
                401,
                "A valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY.",
                headers={"WWW-Authenticate": challenge},
            )

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """Read and check the whole body; None when the client has left."""
        most = self._limits.body_bytes
        too_large = ApiError(413, f"The body is larger than {most:,} bytes.")
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced[:20]) > most:
            raise too_large
        parts = bytearray()
        deadline = asyncio.get_running_loop().time() + self._limits.body_s
        more = True
        while more:
            left = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0))
            except asyncio.TimeoutError:
                raise ApiError(
                    408, f"The body did not arrive within {self._limits.body_s:g} s.", code="timeout"
                ) from None
            if message["type"] == "http.disconnect":
                return None
            parts += message.get("body", b"")
            if len(parts) > most:
                raise too_large
            more = message.get("more_body", False)
        body = bytes(parts)
        if body:
            coding = headers.get(b"content-encoding", b"")
            body = await asyncio.to_thread(plain_body, body, coding, most) if coding else plain_body(body, b"", most)
            # CSRF: a form of another site can send text/plain without a preflight, but not JSON.
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise ApiError(415, "The content type must be application/json.", code="wrong_content_type")
            if len(body) > _SMALL_BYTES:
                await asyncio.to_thread(check_json, body, self._limits.json_depth)
            else:
                check_json(body, self._limits.json_depth)
        return body


def check_json(body: bytes, most_deep: int) -> None:
    """Check that the body can be parsed safely.

    Raises:
        ApiError: it is not JSON, has numbers that JSON lacks, is nested deeper than `most_deep`, or holds text that is
            not Unicode.
    """
    too_deep = ApiError(400, f"The JSON is nested deeper than {most_deep} levels.", code="json_too_deep")
    try:
        parsed = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_single_fields)
    except RecursionError:
        raise too_deep from None
    except ValueError:
        raise ApiError(400, "The body is not valid JSON.", code="invalid_json") from None
    level = [parsed]
    for _ in range(most_deep + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            break
    else:
        raise too_deep
    if b"\\ud" in body.lower():
        try:
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ApiError(400, "The body has half a surrogate pair in it.", code="invalid_json") from None


def _single_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object and refuse duplicate names, of which parsers would use different values."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        shown = twice[:100].encode("ascii", "backslashreplace").decode()
        raise ApiError(400, f"The JSON has the field '{shown}' more than once.", code="invalid_json")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _single_headers(scope: MutableMapping[str, Any]) -> dict[bytes, bytes]:
    """Return the headers by name; those that matter for security may occur only once."""
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in headers and name in _ONCE:
            raise ApiError(400, f"The header {name.decode('latin-1')} occurs more than once.", code="invalid_header")
        headers[name] = value
    return headers


def _host_of(origin: bytes) -> str | None:
    """Host and port of an Origin header; None where it is not an address."""
    try:
        return urlsplit(origin.decode("latin-1").lower()).netloc
    except ValueError:
        return None


def _key_in(authorization: bytes) -> bytes:
    """The key in an Authorization header: a bearer token, or the password of Basic; empty without one."""
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Make a `receive` that gives the body once, and then what the server sends (a disconnect)."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if not is_given:
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed
