"""Run the server process: listen at once, load in the meantime, and end requests in progress when stopped."""

import asyncio
import errno
import math
import signal
import socket
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn

from foreroute.errors import ForerouteError, ServerError
from foreroute.server.app import AddRoutes, create_app
from foreroute.server.backend import Backend
from foreroute.server.connections import patient
from foreroute.server.settings import ServerSettings

# When the server stops, requests in progress are ended; clients that do not read are dropped after this time.
_GRACE_S = 5
_BACKLOG = 256
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket on the first address of `host`; see `listen_all`."""
    first, *others = listen_all(host, port)
    for one in others:
        one.close()
    return first


def listen_all(host: str, port: int) -> list[socket.socket]:
    """Open a listening socket on each address of `host`, as localhost has two; port 0 lets the system choose one.

    Raises:
        ServerError: the host is not known, or an address not available; the message says what to change.
    """
    opened: list[socket.socket] = []
    try:
        found = dict.fromkeys(socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM))
        for family, kind, protocol, _, address in found:
            if opened:
                # All on one port, where the system chose it.
                address = (address[0], opened[0].getsockname()[1], *address[2:])
            try:
                opened.append(_bound(family, kind, protocol, address, is_alone=len(found) == 1))
            except OSError as error:
                # A name may have an address of a protocol that this machine does not have.
                if len(found) == 1 or error.errno not in _ABSENT:
                    raise
        if not opened:
            raise OSError(errno.EADDRNOTAVAIL, "none of its addresses is this machine's")
    except (OSError, OverflowError) as error:
        for one in opened:
            one.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ServerError(f"{host} port {port} cannot be listened on: {reason}. {_advice(error)}") from error
    return opened


def _bound(family: int, kind: int, protocol: int, address: Any, *, is_alone: bool) -> socket.socket:
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not is_alone:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def _advice(error: Exception) -> str:
    """What to change, where an address cannot be listened on."""
    if isinstance(error, socket.gaierror):
        return "Check the name after --host."
    if isinstance(error, OSError) and error.errno in _ABSENT:
        return "Give an address of this machine to --host, or 0.0.0.0 for all of them."
    if isinstance(error, PermissionError):
        return "Ports below 1024 need rights: choose a higher --port."
    return "Choose another --port."


def address_of(listening: socket.socket) -> str:
    """Return the URL for clients: http://..."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server; at shutdown it first ends the engine's requests, so that streams end with an error."""

    def __init__(self, config: uvicorn.Config, backend: Backend) -> None:
        super().__init__(config)
        self._backend = backend

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._backend.stop()
        loaded = self._backend.loaded
        if loaded is not None:
            await asyncio.to_thread(loaded.end_requests)
        await super().shutdown(sockets)


def make_server(backend: Backend, settings: ServerSettings, more: Sequence[AddRoutes] = ()) -> Server:
    """Make a server of `create_app(backend, settings, more)`, without logs, which would hold paths and prompts."""
    config = uvicorn.Config(
        create_app(backend, settings, more),
        http=patient(settings.limits),
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=_GRACE_S,
        timeout_keep_alive=math.ceil(settings.limits.idle_s),
        # A second less than it is kept, for the way.
        headers=[("Keep-Alive", f"timeout={max(math.ceil(settings.limits.idle_s) - 1, 1)}")],
    )
    return Server(config, backend)


def serve(
    backend: Backend,
    settings: ServerSettings,
    listening: Sequence[socket.socket],
    load: Callable[[Backend], None],
    more: Sequence[AddRoutes] = (),
) -> None:
    """Serve until Ctrl-C or SIGTERM, then end requests in progress and return.

    Args:
        backend: made ready by `load`, which is called in a new thread once the server listens. settings: see there.
        listening: from `listen_all`; closed at the end. more: further routes.
    Raises:
        ForerouteError: raised by `load`.
    """
    server = make_server(backend, settings, more)
    failure: list[BaseException] = []

    def loading() -> None:
        try:
            load(backend)
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            backend.fail(str(error) if isinstance(error, ForerouteError) else type(error).__name__)
            failure.append(error)
            server.should_exit = True

    def stop(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    # uvicorn catches a signal, shuts down, and raises it again for the handler before it.
    before = signal.signal(signal.SIGTERM, stop)
    thread = threading.Thread(target=loading, name="foreroute-load", daemon=True)
    thread.start()
    try:
        server.run(sockets=list(listening))
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        for one in listening:
            one.close()
        loaded = backend.loaded
        if loaded is not None:
            loaded.close()
    if failure:
        raise failure[0]
