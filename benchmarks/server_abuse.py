"""Requests that no schema makes: bodies that break off, numbers and nesting beyond JSON's use, grammars that explode.

Used by server_fuzz.py. Each is a path and the bytes of a body; what must come is 200 or 4xx, and no hang.
"""

import json
import random
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

_HI = [{"role": "user", "content": "Hi"}]
_CHAT, _RESPONSES, _MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


def bodies(seed: int) -> Iterator[tuple[str, bytes]]:
    """Some 60 requests, which differ by the seed."""
    draw = random.Random(seed)
    for told in _bodies_of_chats(draw):
        yield _CHAT, json.dumps({"messages": _HI, "max_tokens": 4, **told}).encode()
    for schema in _schemas(draw):
        shape = {"type": "json_schema", "name": "x", "schema": schema}
        yield _CHAT, _json(messages=_HI, max_tokens=4, response_format={**shape, "json_schema": {"schema": schema}})
        yield _RESPONSES, _json(input="Hi", max_output_tokens=16, text={"format": shape})
        yield _MESSAGES, _json(messages=_HI, max_tokens=4, output_config={"format": shape})
    yield _CHAT, _json(messages=_HI, max_tokens=4, guided_regex=f"(a{{1000}}){{{draw.randint(900, 1100)}}}")
    yield _CHAT, _json(messages=_HI, max_tokens=4, guided_grammar="start: " + "a " * draw.randint(1, 9999) + "\na: a a")
    for number in ("1e999", "-1e999", "9" * draw.randint(20, 4000), "NaN", "0." + "1" * 4000, "1E-99999"):
        for name in ("max_tokens", "temperature", "seed", "top_k"):
            yield (
                _CHAT,
                b'{"messages": [{"role": "user", "content": "Hi"}], "%s": %s}' % (name.encode(), number.encode()),
            )
    deep = draw.randint(20, 100_000)
    yield _CHAT, b'{"messages": ' + b"[" * deep + b"]" * deep + b"}"
    yield _MESSAGES, b'{"messages": ' + b'{"a":' * deep
    for text in (b'"\\ud83d"', b'"\\ude00\\ud83d"', b'"\xed\xa0\xbd"', b'"\xff\xfe"', b'"\\u0000"'):
        yield _CHAT, b'{"max_tokens": 2, "messages": [{"role": "user", "content": %s}]}' % text
        yield _RESPONSES, b'{"max_output_tokens": 16, "input": %s}' % text


def _json(**body: Any) -> bytes:
    return json.dumps(body).encode()


def _schemas(draw: random.Random) -> Iterator[Any]:
    many = draw.randint(50, 3000)
    yield {"$ref": "#/$defs/a0", "$defs": {f"a{at}": {"$ref": f"#/$defs/a{at + 1}"} for at in range(many)}}
    yield {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    yield {"enum": [f"{draw.random()}" for _ in range(many * 3)]}
    parts: Any = {"type": "object", "properties": {"x": {"type": "integer"}}}
    for _ in range(draw.randint(2, 12)):
        parts = {"allOf": [parts, parts]}
    yield parts
    yield {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$", "minLength": many * 1000}
    yield {"type": "array", "minItems": 10 ** draw.randint(3, 12), "items": {"type": "null"}}
    yield {"type": "integer", "multipleOf": 10 ** -draw.randint(1, 300), "minimum": 10**300}


def _bodies_of_chats(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Tools and their calls, as no client should send them."""
    tool: dict[str, Any] = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    yield {"tools": [tool, tool]}
    yield {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "other"}}}
    yield {"tools": [{"type": "function", "function": {"name": "a" * draw.randint(1, 9999)}}]}
    yield {"tools": [{"type": "function", "function": {"name": "a", "parameters": [1]}}], "tool_choice": "required"}
    for arguments in ("{", '{"a": }', "[1]", "null", "", '"' * draw.randint(1, 99), {"a": 1}, 5):
        call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": arguments}}
        yield {"tools": [tool], "messages": [*_HI, {"role": "assistant", "content": None, "tool_calls": [call]}]}
        calls = {"role": "assistant", "content": None, "tool_calls": [call, call]}
        results = [{"role": "tool", "tool_call_id": "a", "content": "1"}] * 2
        yield {"tools": [tool], "messages": [*_HI, calls, *results]}
    yield {"messages": [*_HI, {"role": "tool", "tool_call_id": "never", "content": "1"}]}
    yield {"messages": [{"role": "tool", "content": "1"}]}


def broken_off(url: str, seed: int, within_s: float) -> None:
    """Send a body that is shorter than its Content-Length, and leave; or wait for the refusal."""
    draw, address = random.Random(seed), urlsplit(url)
    with socket.create_connection((address.hostname or "", address.port or 80), timeout=within_s) as sent:
        path = draw.choice((_CHAT, _RESPONSES, _MESSAGES, "/tokenize"))
        head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        body = _json(messages=_HI)[: draw.randint(0, 20)]
        sent.sendall(f"{head}Content-Length: {draw.randint(21, 10**6)}\r\n\r\n".encode() + body)
