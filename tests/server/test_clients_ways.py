"""What clients and proxies of all kinds send beside the request itself: paths, codings, upgrades, kept connections."""

import gzip
import json
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foreroute.errors import ServerError
from foreroute.server import run
from foreroute.server.backend import Backend, Prompts, Serving
from foreroute.server.paths import usual
from foreroute.server.settings import Limits, ServerSettings
from tests.server.conftest import Served
from tests.server.fake_engine import FakeEngine
from tests.server.sockets import connect, post, read_until, running, running_server, wait_until

Serve = Callable[..., Served]
BODY = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()
PACKED = gzip.compress(BODY, mtime=0)
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("path", [CHAT, "/chat/completions", "/v1/v1/chat/completions"])
def test_paths_with_and_without_a_version(serve: Serve, path: str) -> None:
    client = serve().client
    assert client.post(path, content=BODY, headers={"content-type": "application/json"}).status_code == 200
    prefix = path.removesuffix("/chat/completions")
    assert client.post(f"{prefix}/completions", json={"prompt": "Hi"}).status_code == 200
    assert client.get(f"{prefix}/models/other").json()["id"] == "other"
    assert client.get(f"{prefix}/models").json()["object"] == "list"
    assert client.post(f"{prefix}/tokenize", json={"prompt": "Hi"}).json()["count"] == 2


@pytest.mark.parametrize(
    "path", ["/", "/health", "/v1", "/v1/health", "/metrics", "/page/main.js", "/v2/models", "/xv1/models"]
)
def test_other_paths_are_what_they_are(path: str) -> None:
    assert usual(path) == path


def sent(served: Served, body: bytes, **headers: str) -> Any:
    named = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return served.client.post(CHAT, content=body, headers=named)


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (b"\xef\xbb\xbf" + BODY, ""), (PACKED, "gzip"),
        (gzip.compress(b"\xef\xbb\xbf" + BODY, mtime=0), "GZip"),
        (zlib.compress(BODY), "deflate"), (BODY, "identity"), (PACKED, "x-gzip"),
    ],
)  # fmt: skip
def test_bodies_with_a_mark_or_compressed(serve: Serve, body: bytes, coding: str) -> None:
    served = serve()
    assert sent(served, body, **({"content_encoding": coding} if coding else {})).status_code == 200
    assert len(served.engine.requests) == 1


@pytest.mark.parametrize(
    ("body", "coding", "status", "said"),
    [
        (BODY, "gzip", 400, "not compressed"), (PACKED[:-4], "gzip", 400, "not whole"), (BODY, "br", 415, "'br'"),
        (PACKED + b"x", "gzip", 400, "not whole"), (PACKED, "", 400, "Content-Encoding: gzip"),
        (BODY, "gzip, gzip", 415, "'gzip, gzip'"), ("{}".encode("utf-16"), "", 400, "UTF-16"),
        (gzip.compress(b" " * 2**21, mtime=0), "gzip", 413, "unpacked"),
    ],
)  # fmt: skip
def test_bodies_that_cannot_be_read_are_named(serve: Serve, body: bytes, coding: str, status: int, said: str) -> None:
    served = serve(ServerSettings(limits=Limits(body_bytes=2**20)))
    answer = sent(served, body, **({"content_encoding": coding} if coding else {}))
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def upgrade(url: str, connection: socket.socket) -> bytes:
    host = url.removeprefix("http://")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    head += "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY)
    return read_until(connection, b"usage")


def test_an_upgrade_to_http2_keeps_its_body_and_its_connection(byte_tokenizer: Any, prompts: Prompts) -> None:
    engine = FakeEngine(byte_tokenizer)
    with running(Backend(Serving(engine, prompts, engine.context)), ServerSettings()) as url:
        connection = connect(url)
        for _ in range(2):
            answer = upgrade(url, connection)
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"keep-alive: timeout=359" in answer.lower()
        connection.close()
    assert [len(request.prompt_ids) for request in engine.requests] == [len(engine.requests[0].prompt_ids)] * 2


def test_httptools_is_not_used_where_it_is_installed(tmp_path: Path) -> None:
    """uvicorn would; with it, the body of a request with an upgrade is lost."""
    (tmp_path / "httptools.py").write_text("class HttpRequestParser: pass\nclass HttpParserError(Exception): pass\n")
    told = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(run.__file__).parents[2])!r}]\n"
        "from foreroute.server.connections import patient\nfrom foreroute.server.settings import Limits\n"
        "print([base.__name__ for base in patient(Limits()).__mro__])"
    )
    assert (
        "H11Protocol" in subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout
    )


def test_a_connection_is_kept_for_longer_than_a_head_may_take(byte_tokenizer: Any, prompts: Prompts) -> None:
    engine = FakeEngine(byte_tokenizer)
    settings = ServerSettings(limits=Limits(head_s=30.0, idle_s=3600.0))
    with running_server(Backend(Serving(engine, prompts, engine.context)), settings) as (url, server):
        connection = post(url, CHAT, json.loads(BODY))
        read_until(connection, b"usage")
        (protocol,) = server.server_state.connections
        wait_until(lambda: protocol._is_idle)
        left_s = protocol._timer.when() - protocol.loop.time()
        assert left_s > 60, "it is closed as if the head of a request were late"
        connection.close()


def test_a_name_with_two_addresses_is_listened_on_at_both(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [("127.0.0.1", 0), ("127.0.0.2", 0), ("192.0.2.1", 0)]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in names]
    monkeypatch.setattr(run.socket, "getaddrinfo", lambda *_, **__: found)
    opened = run.listen_all("localhost", 0)
    try:
        assert [one.getsockname()[0] for one in opened] == ["127.0.0.1", "127.0.0.2"]
        assert len({one.getsockname()[1] for one in opened}) == 1
    finally:
        for one in opened:
            one.close()


@pytest.mark.parametrize(
    ("host", "port", "advice"),
    [
        ("192.0.2.1", 0, "an address of this machine"),
        ("no-such-host.invalid", 0, "Check the name"),
    ],
)
def test_why_an_address_cannot_be_listened_on(host: str, port: int, advice: str) -> None:
    with pytest.raises(ServerError, match=advice):
        run.listen_all(host, port)


def test_a_taken_port_and_one_without_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = run.listen("127.0.0.1", 0)
    with pytest.raises(ServerError, match=r"in use. Choose another --port"):
        run.listen_all("127.0.0.1", taken.getsockname()[1])
    taken.close()

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run, "_bound", refuse)
    with pytest.raises(ServerError, match="a higher --port"):
        run.listen_all("127.0.0.1", 80)


def test_templates_without_a_default_are_named(
    serve: Serve, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_tokenizer, "chat_template", {"tool_use": "x", "rag": "y"})
    served = serve(own_prompts=Prompts(byte_tokenizer, 300, Limits()))
    message = served.chat().json()["error"]["message"]
    assert "rag, tool_use and no default" in message
    assert served.complete().status_code == 200
