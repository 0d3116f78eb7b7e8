"""Files of a checkpoint as a broken download, another program or ill will leave them: the same ones for the same seed.

Every kind of file has a way to take it apart and put it together again, so that what is spoilt is what a reader looks
at: a header's JSON under a length and a checksum that are right, not a byte that the checksum gives away.
"""

import json
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0123456789abcdef" * 4 + b"\nsize 123456\n"
# In place of any value. Each has been a traceback somewhere, or an endless loop.
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**62, 2**63, 10**30, 0.5, -2.5, 1e308, float("inf"), float("nan"), "", "x",
    "é\u4e2d", "\ud800", "x" * 5000, [], [[]], [0], ["x"], [None], {}, {"a": 1}, {"a": {}},
)  # fmt: skip
_DEEP = 100_000


@dataclass(frozen=True)
class Spoilt:
    """One spoilt file: its name in the checkpoint's folder, its bytes, and what was done to it."""

    kind: str
    number: int
    file: str
    content: bytes
    what: str


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it lies, and the text in it that readers parse.

    is_json: that text is JSON. take: from the file's bytes to the text. put: from the file's bytes and another text to
    a file with that text in it, lengths and checksums made right.
    """

    name: str
    file: str
    is_json: bool = True
    take: Callable[[bytes], bytes] = bytes
    put: Callable[[bytes, bytes], bytes] = lambda whole, text: text


def _safetensors_header(whole: bytes) -> bytes:
    (length,) = struct.unpack("<Q", whole[:8])
    return whole[8 : 8 + length]


def _with_safetensors_header(whole: bytes, text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + whole[8 + len(_safetensors_header(whole)) :]


def _account(whole: bytes) -> bytes:
    """What a sidecar says of itself."""
    said: str = json.loads(_safetensors_header(whole))["__metadata__"]["foreroute"]
    return said.encode()


def _with_account(whole: bytes, text: bytes) -> bytes:
    header = json.loads(_safetensors_header(whole))
    header["__metadata__"]["foreroute"] = text.decode("utf-8", "replace")
    return _with_safetensors_header(whole, json.dumps(header).encode())


_PREAMBLE = struct.Struct("<8sQQ")
_PAGE = 4096


def _store_header(whole: bytes) -> bytes:
    _, length, _ = _PREAMBLE.unpack(whole[: _PREAMBLE.size])
    return whole[_PREAMBLE.size : _PREAMBLE.size + length]


def _with_store_header(whole: bytes, text: bytes) -> bytes:
    def table_start(header: bytes) -> int:
        return -(-(_PREAMBLE.size + len(header)) // _PAGE) * _PAGE

    head = _PREAMBLE.pack(whole[:8], len(text), xxhash.xxh3_64_intdigest(text)) + text
    return head.ljust(table_start(text), b"\0") + whole[table_start(_store_header(whole)) :]


# Beyond these bytes a GGUF file has blocks of numbers, which any bytes are.
_GGUF_HEADER = 4096

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("config", "config.json"),
        Kind("generation config", "generation_config.json"),
        Kind("tokenizer", "tokenizer.json"),
        Kind("tokenizer config", "tokenizer_config.json"),
        Kind("index", "model.safetensors.index.json"),
        Kind("chat template", "chat_template.jinja", is_json=False),
        Kind("safetensors header", "", take=_safetensors_header, put=_with_safetensors_header),
        Kind("store header", "experts.q4_0-dense-q8_0.foreroute", take=_store_header, put=_with_store_header),
        Kind("sidecar", "predictor.foreroute.safetensors", take=_account, put=_with_account),
        Kind("gguf header", "model.gguf", is_json=False,
             take=lambda whole: whole[:_GGUF_HEADER], put=lambda whole, text: text + whole[_GGUF_HEADER:]),
    )
}  # fmt: skip


def spoil(kind: Kind, folder: Path, number: int) -> Spoilt:
    """The `number`-th spoilt file of a kind, made from the whole one in `folder`."""
    chance = random.Random(f"{kind.name} {number}")
    file = kind.file or _first_shard(folder)
    whole = (folder / file).read_bytes()
    if number < len(_TEXTS):
        what, change = _TEXTS[number]
        return Spoilt(kind.name, number, file, kind.put(whole, change(kind.take(whole), chance)), what)
    if number < len(_TEXTS) + len(_WHOLE):
        what, change = _WHOLE[number - len(_TEXTS)]
        return Spoilt(kind.name, number, file, change(whole, chance), what)
    if not kind.is_json:
        what, change = chance.choice(_BYTES)
        return Spoilt(kind.name, number, file, kind.put(whole, change(kind.take(whole), chance)), what)
    parsed = json.loads(kind.take(whole))
    what = _change_json(parsed, chance)
    text = json.dumps(parsed, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    return Spoilt(kind.name, number, file, kind.put(whole, text), what)


def _first_shard(folder: Path) -> str:
    return min(path.name for path in folder.glob("model*.safetensors"))


_Change = Callable[[bytes, random.Random], bytes]
# Of the text that is parsed, and of the whole file.
_TEXTS: tuple[tuple[str, _Change], ...] = (
    ("empty", lambda text, chance: b""),
    ("cut off", lambda text, chance: text[: chance.randrange(1, len(text))]),
    ("cut off near its end", lambda text, chance: text[: -chance.randrange(1, 9)]),
    ("a list", lambda text, chance: b"[]"),
    ("null", lambda text, chance: b"null"),
    ("an empty object", lambda text, chance: b"{}"),
    ("lists nested deep", lambda text, chance: b"[" * _DEEP + b"]" * _DEEP),
    ("objects nested deep", lambda text, chance: b'{"a":' * _DEEP + b"1" + b"}" * _DEEP),
    ("a value nested deep", lambda text, chance: b'{"a":' + b"[" * _DEEP + b"]" * _DEEP + b"," + text[1:]),
    ("not UTF-8", lambda text, chance: text[: len(text) // 2] + b"\xff\xfe" + text[len(text) // 2 :]),
)
_WHOLE: tuple[tuple[str, _Change], ...] = (
    ("a pointer", lambda whole, chance: POINTER),
    ("an empty file", lambda whole, chance: b""),
    ("a web page", lambda whole, chance: b"<!DOCTYPE html><html><title>429</title></html>\n" * 20),
    ("a cut-off file", lambda whole, chance: whole[: chance.randrange(1, len(whole))]),
    ("a file of zeros", lambda whole, chance: bytes(len(whole))),
)


def _overwritten(text: bytes, chance: random.Random) -> bytes:
    """Four or eight bytes become a number that is much too large, or zero."""
    size = chance.choice((4, 8))
    at = chance.randrange(max(1, len(text) - size))
    value = chance.choice((0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1)) % 2 ** (8 * size)
    return text[:at] + value.to_bytes(size, "little") + text[at + size :]


def _flipped(text: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(text))
    return text[:at] + bytes([text[at] ^ (1 << chance.randrange(8))]) + text[at + 1 :]


def _without_piece(text: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(text))
    return text[:at] + text[at + chance.randrange(1, 17) :]


def _with_piece(text: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(text))
    piece = chance.choice(
        (b"{%", b"{{", b"%}", b"}}", b"{% if x %}", b"{{ messages[99] }}", b"\0\0\0\0", b"{{ 1 / 0 }}")
    )
    return text[:at] + piece + text[at:]


_BYTES: tuple[tuple[str, _Change], ...] = (
    ("a bit turned over", _flipped),
    ("a number overwritten", _overwritten),
    ("bytes taken out", _without_piece),
    ("bytes put in", _with_piece),
)


def _change_json(parsed: Any, chance: random.Random) -> str:
    """Spoil one place of the value, in place; what was done, in words."""
    holder, key, path = _place(parsed, chance)
    old = holder[key]
    deed = chance.choice(("value", "value", "value", "away", "renamed", "wrapped", "scaled", "twin"))
    if deed == "away":
        del holder[key]
        return f"{path} taken away"
    if deed == "renamed" and isinstance(holder, dict):
        holder[chance.choice((f"{key}_", "", str(key).upper(), "\u00e9"))] = holder.pop(key)
        return f"{path} renamed"
    if deed == "wrapped":
        holder[key] = chance.choice(([old], {"a": old}, [old, old], str(old)[:100]))
        return f"{path} wrapped"
    if deed == "scaled" and type(old) in (int, float):
        holder[key] = chance.choice((old * 2, old + 1, old - 1, -old, old * 1000, old // 2))
        return f"{path} is {holder[key]!r}"
    if deed == "twin" and isinstance(holder, dict):
        other = chance.choice(list(holder))
        holder[key], holder[other] = holder[other], holder[key]
        return f"{path} and {other} exchanged"
    holder[key] = chance.choice(_VALUES)
    return f"{path} is {holder[key]!r:.40}"


def _place(parsed: Any, chance: random.Random) -> tuple[Any, Any, str]:
    """A random place: the dict or list, the key in it, and how to name it. Near the top as often as deep down."""
    holder, path = parsed, ""
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = chance.choice(keys)
        path += f"[{key}]" if isinstance(holder, list) else f".{key}" if path else str(key)
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or chance.random() < 0.35:
            return holder, key, path
        holder = inner
