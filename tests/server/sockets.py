"""A server behind a real socket, in a thread, and clients that behave badly."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from foreroute.server.backend import Backend
from foreroute.server.run import Server, address_of, listen, make_server
from foreroute.server.settings import ServerSettings


@contextlib.contextmanager
def running(backend: Backend, settings: ServerSettings) -> Iterator[str]:
    """While inside, the server listens at the URL that this gives."""
    with running_server(backend, settings) as (url, _):
        yield url


@contextlib.contextmanager
def running_server(backend: Backend, settings: ServerSettings) -> Iterator[tuple[str, Server]]:
    """The same, and the server itself, which knows its connections."""
    listening = listen("127.0.0.1", 0)
    server = make_server(backend, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield address_of(listening), server
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive(), "the server does not stop"


def wait_until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Return once it holds. A machine that is busy is waited for: what is tested is that it comes at all."""
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.01)


def connect(url: str, receive_bytes: int | None = None) -> socket.socket:
    """A connection to the server, over which nothing has been sent."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect((host, int(port)))
    return connection


def post(url: str, path: str, body: dict[str, Any], receive_bytes: int | None = None, key: str = "") -> socket.socket:
    """Send a request and leave the answer unread."""
    host, port = url.removeprefix("http://").split(":")
    connection = connect(url, receive_bytes)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    if key:
        head += f"Authorization: Bearer {key}\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def read_until(connection: socket.socket, what: bytes, within_s: float = 20.0) -> bytes:
    """Read until `what` has come."""
    connection.settimeout(within_s)
    got = b""
    while what not in got:
        part = connection.recv(65536)
        assert part, f"ended without {what!r}: {got[-300:]!r}"
        got += part
    return got
