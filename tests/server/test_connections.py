"""Real sockets: who leaves frees what they held, who waits is kept company, who does not read is left."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from foreroute.server.backend import Backend, Prompts, Serving
from foreroute.server.settings import Limits, ServerSettings, idle_connections_of
from tests.server.fake_engine import FakeEngine
from tests.server.sockets import connect, post, read_until, running, running_server, wait_until

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def engine(byte_tokenizer: Any) -> FakeEngine:
    return FakeEngine(byte_tokenizer, "Hello", context=100_000)


@pytest.fixture
def url(engine: FakeEngine, prompts: Prompts) -> Iterator[str]:
    settings = ServerSettings(keep_alive_s=0.05, limits=Limits(send_s=0.5, body_s=0.5))
    with running(Backend(Serving(engine, prompts, engine.context)), settings) as where:
        yield where


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_who_leaves_is_not_worked_for(engine: FakeEngine, url: str, stream: bool, path: str) -> None:
    engine.gate.clear()
    body = {"messages": HI} if path == CHAT else {"prompt": "Hi"}
    connection = post(url, path, {**body, "stream": stream, "n": 3})
    wait_until(lambda: engine.state().running == 3)
    if stream:
        read_until(connection, b": keep-alive")
    left = time.monotonic()
    connection.close()
    wait_until(lambda: engine.state().running == 0)
    assert time.monotonic() - left < 5  # a second, on a machine of one's own
    assert sorted(engine.cancelled) == [0, 1, 2]


def test_who_leaves_in_the_middle(engine: FakeEngine, url: str) -> None:
    engine.answer = "x" * 50_000
    connection = post(url, CHAT, {"messages": HI, "stream": True})
    read_until(connection, b'"content":"x"')
    connection.close()
    wait_until(lambda: engine.cancelled == [0])
    # The server goes on.
    engine.answer = "Hello"
    assert b"Hello" in read_until(post(url, CHAT, {"messages": HI}), b"usage")


def test_comments_while_waiting(engine: FakeEngine, url: str) -> None:
    engine.gate.clear()
    connection = post(url, CHAT, {"messages": HI, "stream": True})
    got = read_until(connection, b": keep-alive\n\n")
    assert b'"role":"assistant"' in got
    engine.gate.set()
    got += read_until(connection, b"data: [DONE]\n\n")
    texts = [part.split(b'"')[0] for part in got.split(b'"content":"')[1:]]
    assert b"".join(texts) == b"Hello"


def test_who_does_not_read_is_left(engine: FakeEngine, prompts: Prompts) -> None:
    engine.answer = "x" * 6_000
    asked = {"messages": HI, "stream": True, "logprobs": True, "top_logprobs": 20}
    settings = ServerSettings(limits=Limits(send_s=0.5))
    with running_server(Backend(Serving(engine, prompts, engine.context)), settings) as (url, server):
        connection = post(url, CHAT, asked, receive_bytes=4096)
        wait_until(lambda: engine.state().running == 0)
        # All tokens are there, and more than a socket takes in: it is left, though nothing is ever read.
        wait_until(lambda: not server.server_state.connections)
        connection.close()


def test_who_asks_on_and_does_not_read_takes_no_place(engine: FakeEngine, prompts: Prompts) -> None:
    """Requests one after another, none of whose answers is read, by one who has no key."""
    settings = ServerSettings(api_keys=("sesame",), limits=Limits(in_flight=1, send_s=0.5))
    with running_server(Backend(Serving(engine, prompts, engine.context)), settings) as (url, server):
        with connect(url, receive_bytes=4096) as connection:
            connection.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                while True:
                    connection.sendall(GET.encode() * 100)
            wait_until(lambda: not server.server_state.connections)
        assert server.server_state.tasks == set()
        asked = post(url, CHAT, {"messages": HI}, key="sesame")
        assert b"Hello" in read_until(asked, b"usage")


def test_a_body_that_does_not_come(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
        connection.sendall(head.encode() + b'{"mess')
        assert b"408" in read_until(connection, b"timeout")


HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n"
GET = "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "more", "answer"),
    [
        ("", "", b""),
        ("GET /ver", "", b""),
        ("GET /version HTTP/1.1\r\n", "X: y\r\n", b""),
        (GET, "G", b'"version"'),
        # Refused, by its host and for its slowness: what comes of the body afterwards keeps nothing open.
        (HEAD.replace("localhost", "evil.example"), "a", b"wrong_host"),
        (HEAD, "a", b"timeout"),
    ],
)
def test_who_sends_a_letter_now_and_then_is_left(
    engine: FakeEngine, prompts: Prompts, first: str, more: str, answer: bytes
) -> None:
    settings = ServerSettings(limits=Limits(head_s=0.6, body_s=0.3))
    with running(Backend(Serving(engine, prompts, engine.context)), settings) as url:
        connection = connect(url)
        connection.sendall(first.encode())
        connection.settimeout(0.05)
        got, until = b"", time.monotonic() + 20
        while time.monotonic() < until:
            try:
                part = connection.recv(65536)
            except TimeoutError:
                with contextlib.suppress(OSError):
                    connection.sendall(more.encode())
                continue
            except ConnectionResetError:
                break
            if not part:
                break
            got += part
        else:
            raise AssertionError("it is still open")
        assert answer in got


def test_a_body_whose_end_is_told_twice(engine: FakeEngine, url: str) -> None:
    """Content-Length 3, and chunks of more: a proxy may take what follows the three bytes for another request."""
    connection = connect(url)
    content = json.dumps({"prompt": "a"}).encode()
    head = HEAD.replace("5000", "3").replace("\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n")
    connection.sendall(head.encode() + b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content))
    assert b"400" in read_until(connection, b"invalid_header")
    assert engine.requests == []


def test_who_is_answered_in_time_is_not_left(engine: FakeEngine, prompts: Prompts) -> None:
    """Neither an answer that takes longer than a request may, nor several requests of one connection."""
    settings = ServerSettings(limits=Limits(head_s=0.5))
    engine.gate.clear()
    with running(Backend(Serving(engine, prompts, engine.context)), settings) as url:
        connection = post(url, CHAT, {"messages": HI})
        wait_until(lambda: engine.state().running == 1)
        time.sleep(1.2)
        engine.gate.set()
        assert b"Hello" in read_until(connection, b"usage")
        assert _answers(connection, 8)
        # From its first byte on, the time for the next request runs.
        connection.sendall(b"GET /ver")
        connection.settimeout(20)
        assert connection.recv(1) == b""
        assert _answers(connect(url), 8)


def test_a_request_on_a_kept_connection_has_all_of_its_time(engine: FakeEngine, prompts: Prompts) -> None:
    """Whose first lines begin late and come in two parts, over more time than was left after the last answer."""
    with running(Backend(Serving(engine, prompts, engine.context)), ServerSettings(limits=Limits(head_s=3))) as url:
        connection = connect(url)
        for _ in range(2):
            connection.sendall(GET.encode())
            assert b"200" in read_until(connection, b'"version"')
            time.sleep(2)
            connection.sendall(GET[:10].encode())
            time.sleep(1.5)
            connection.sendall(GET[10:].encode())
            assert b"200" in read_until(connection, b'"version"')


def _answers(connection: socket.socket, count: int) -> bool:
    """Whether requests that come one soon after another are answered, over more time than one of them has."""
    for _ in range(count):
        time.sleep(0.1)
        connection.sendall(GET.encode())
        if b"200" not in read_until(connection, b'"version"'):
            return False
    return True


def test_an_answer_that_is_not_read_is_dropped(engine: FakeEngine, prompts: Prompts) -> None:
    settings = ServerSettings(limits=Limits(head_s=0.3, send_s=0.5))
    with running(Backend(Serving(engine, prompts, engine.context)), settings) as url:
        connection = post(url, "/tokenize", {"prompt": "x" * 4_000_000}, receive_bytes=4096)
        connection.settimeout(20)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        # Its end is not sent any more, however late it is asked for.
        time.sleep(2.5)
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(2**20):
                got += len(part)
        assert got < 8_000_000


def test_stopping_ends_what_runs(engine: FakeEngine, prompts: Prompts) -> None:
    engine.gate.clear()
    with running(Backend(Serving(engine, prompts, engine.context)), ServerSettings()) as url:
        streamed = post(url, CHAT, {"messages": HI, "stream": True})
        whole = post(url, CHAT, {"messages": HI})
        read_until(streamed, b'"role":"assistant"')
        wait_until(lambda: engine.state().running == 2)
    assert b"shutting down" in read_until(streamed, b"data: [DONE]\n\n")
    assert b"503" in read_until(whole, b"shutting down")
    assert engine.state().running == 0


def test_no_more_at_once_than_the_limit(engine: FakeEngine, prompts: Prompts) -> None:
    engine.gate.clear()
    settings = ServerSettings(limits=Limits(in_flight=2))
    with running(Backend(Serving(engine, prompts, engine.context)), settings) as url:
        held = [post(url, CHAT, {"messages": HI, "stream": True}) for _ in range(2)]
        wait_until(lambda: engine.state().running == 2)
        refused = read_until(post(url, CHAT, {"messages": HI}), b"too_many_requests")
        assert b"503" in refused
        assert b"retry-after: 1" in refused.lower()
        held.pop().close()
        wait_until(lambda: engine.state().running == 1)
        engine.gate.set()
        assert b"Hello" in read_until(post(url, CHAT, {"messages": HI}), b"usage")


def test_how_many_wait_is_what_descriptors_allow() -> None:
    assert [idle_connections_of(many) for many in (1024, 4096, 10**6, None, 600, 64)] == [512, 3584, 4096, 4096, 88, 16]


def test_of_too_many_idle_connections_the_longest_idle_is_closed(engine: FakeEngine, prompts: Prompts) -> None:
    """Never one that has a request; half a head is none."""
    backend = Backend(Serving(engine, prompts, engine.context))
    with running(backend, ServerSettings(limits=Limits(idle_connections=3))) as url:
        engine.gate.clear()
        busy = post(url, CHAT, {"messages": HI, "stream": True})
        wait_until(lambda: engine.state().running == 1)
        health = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        idle = []
        for at in range(3):
            idle.append(connect(url))
            idle[at].settimeout(20)
            if at:
                idle[at].sendall(health)
                read_until(idle[at], b"ready")
            else:
                idle[at].sendall(health[:20])
        idle.append(connect(url))
        assert idle[0].recv(100) == b"", "it was the first"
        idle[1].sendall(health)
        read_until(idle[1], b"ready")
        idle.append(connect(url))
        assert idle[2].recv(100) == b"", "the other had a request later"
        for one in (idle[1], idle[3], idle[4]):
            one.sendall(health)
            read_until(one, b"ready")
        engine.gate.set()
        read_until(busy, b"[DONE]")
        for one in (busy, *idle):
            one.close()
