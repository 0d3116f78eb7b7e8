"""What a client sends as a body, as the JSON text that it stands for: without a byte order mark, and uncompressed."""

import codecs
import zlib

from foreroute.server.api.problems import ApiError

# zlib's sign for: gzip's header or zlib's own, whichever comes.
_GZIP_OR_ZLIB = 47
_COMPRESSED = frozenset({b"gzip", b"x-gzip", b"deflate"})
_GZIP_MAGIC = b"\x1f\x8b"


def plain_body(body: bytes, coding: bytes, most_bytes: int) -> bytes:
    """Return the text of a body.

    Args:
        coding: its Content-Encoding. most_bytes: of the text.
    Raises:
        ApiError: 413 for a longer text, 415 for another coding, 400 where it is not what it says.
    """
    coding = coding.strip().lower()
    if coding in _COMPRESSED:
        body = _unpacked(body, most_bytes)
    elif coding not in (b"", b"identity"):
        shown = coding[:40].decode("latin-1")
        raise ApiError(
            415, f"Content-Encoding {shown!r} is not read here: send gzip, or no coding.", code="wrong_content_encoding"
        )
    elif body.startswith(_GZIP_MAGIC):
        raise ApiError(400, "The body is gzip. Say so: Content-Encoding: gzip.", code="invalid_json")
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ApiError(400, "The body is UTF-16. JSON is sent as UTF-8.", code="invalid_json")
    return body.removeprefix(codecs.BOM_UTF8)


def _unpacked(body: bytes, most_bytes: int) -> bytes:
    """Decompress, and stop where the text gets too long: a few kilobytes can stand for gigabytes."""
    damaged = ApiError(400, "The body is not whole, or not compressed as Content-Encoding says.", code="invalid_body")
    reader = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        text = reader.decompress(body, most_bytes + 1)
    except zlib.error:
        raise damaged from None
    if len(text) > most_bytes:
        raise ApiError(413, f"The body is larger than {most_bytes:,} bytes when it is unpacked.")
    if not reader.eof or reader.unused_data:
        raise damaged
    return text
