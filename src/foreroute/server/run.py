"""Run the server process: listen at once, load in the meantime, and end requests in progress when stopped."""

import asyncio
import signal
import socket
import threading
import types
from collections.abc import Callable, Sequence

import uvicorn

from foreroute.errors import ForerouteError, ServerError
from foreroute.server.app import AddRoutes, create_app
from foreroute.server.backend import Backend
from foreroute.server.connections import patient
from foreroute.server.settings import ServerSettings

# When the server stops, requests in progress are ended; clients that do not read are dropped after this time.
_GRACE_S = 5
_BACKLOG = 256


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket on `host`; port 0 lets the system choose one.

    Raises:
        ServerError: the address is not available.
    """
    name = host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except OSError:
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ServerError(f"{host} port {port} cannot be listened on: {reason}. Choose another --port.") from error
    return listening


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
            await asyncio.to_thread(loaded.engine.close)
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
        timeout_keep_alive=30,
    )
    return Server(config, backend)


def serve(
    backend: Backend,
    settings: ServerSettings,
    listening: socket.socket,
    load: Callable[[Backend], None],
    more: Sequence[AddRoutes] = (),
) -> None:
    """Serve until Ctrl-C or SIGTERM, then end requests in progress and return.

    Args:
        backend: made ready by `load`, which is called in a new thread once the server listens. settings: see there.
        listening: from `listen`; closed at the end. more: further routes.
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
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        listening.close()
        loaded = backend.loaded
        if loaded is not None:
            loaded.engine.close()
            loaded.prompts.close()
    if failure:
        raise failure[0]
