"""A scripted model: a server whose answers are given, with the special tokens and the template of a format."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

pytest.importorskip("fastapi", reason="needs fastapi: pip install foreroute[serve]")

from starlette.testclient import TestClient

from foreroute.server.app import create_app
from foreroute.server.backend import Backend, Prompts, Serving
from foreroute.server.dialogue.parsing.formats import Format
from foreroute.server.dialogue.reading import TemplateReading
from foreroute.server.dialogue.template_worker import read, render
from foreroute.server.dialogue.templates import refused
from foreroute.server.settings import Limits, ServerSettings
from tests.server.fake_engine import FakeEngine


class Scripted(NamedTuple):
    """client: speaks to the server. engine: what answers. prompt: the last one as text. app: the whole server.
    backend: what is behind it."""

    client: TestClient
    engine: FakeEngine
    tokenizer: Any
    app: Any
    backend: Backend

    def ask(self, *messages: Any, **more: Any) -> Any:
        body = {"messages": list(messages) or [{"role": "user", "content": "Hi"}], **more}
        return self.client.post("/v1/chat/completions", json=body)

    @property
    def prompt(self) -> str:
        return self.tokenizer.decode(list(self.engine.requests[-1].prompt_ids))


class RenderedHere:
    """Renders as the template's process does, in this one: its start takes seconds."""

    def __init__(self, template: str, special: dict[str, str]) -> None:
        self._asked = {"template": template, "variables": special, "most_chars": 10**6, "most_s": 5}
        self._special = special

    def reading(self) -> TemplateReading:
        return TemplateReading.from_json(read(self._asked)["reading"])

    def render(self, messages: Any, tools: Any = None, variables: Any = None) -> str:
        given = {"messages": messages, "tools": tools, "variables": {**(variables or {}), **self._special}}
        found = render({**self._asked, **given})
        if "error" in found:
            raise refused(found["error"])
        return found["text"]

    def close(self) -> None: ...


@pytest.fixture
def speak(byte_tokenizer: Any) -> Iterator[Callable[..., Scripted]]:
    """`speak(template, answer, special=(), calls=None)`: a server that answers this."""
    opened: list[TestClient] = []

    def speaking(template: str, answer: str, special: tuple[str, ...] = (), calls: Format | None = None) -> Scripted:
        tokenizer = copy.deepcopy(byte_tokenizer)
        tokenizer.chat_template = template
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        prompts = Prompts(tokenizer, len(tokenizer), Limits(), calls=calls)
        prompts._renderer = RenderedHere(template, {})
        engine = FakeEngine(tokenizer, answer, context=16384)
        backend = Backend(Serving(engine, prompts, engine.context))
        app = create_app(backend, ServerSettings())
        client = TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)
        client.__enter__()
        opened.append(client)
        return Scripted(client, engine, tokenizer, app, backend)

    yield speaking
    for client in opened:
        client.__exit__(None, None, None)
