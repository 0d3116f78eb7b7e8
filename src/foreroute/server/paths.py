"""Paths as clients write them: with /v1 or without it, or with it twice where a client adds its own."""

import re
from collections.abc import MutableMapping
from typing import Any

from foreroute.server.guard import App

_VERSION = "/v1"
# What lies under /v1; the other paths (/health, /metrics, the page) lie beside it.
_UNDER = re.compile(r"/(chat/completions|completions|models(/.*)?|responses(/.*)?|messages(/count_tokens)?|embeddings)")
# vLLM has these beside it, and some clients look for them below.
_BESIDE = re.compile(r"/(tokenize|detokenize|tokenizer_info)")


def usual(path: str) -> str:
    """Return the path that is routed for `path`."""
    bare = path
    while bare.startswith(_VERSION + "/"):
        bare = bare[len(_VERSION) :]
    if _UNDER.fullmatch(bare):
        return _VERSION + bare
    return bare if _BESIDE.fullmatch(bare) else path


class UsualPaths:
    """ASGI middleware that routes every spelling to one path. It comes behind the guard, which has let the request in.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Pass the request on; scope, receive, send: see ASGI."""
        if scope["type"] == "http":
            scope = {**scope, "path": usual(scope["path"])}
        await self._app(scope, receive, send)
