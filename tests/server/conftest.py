"""A server over a fake engine, in this process: no model, no socket."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest

pytest.importorskip("fastapi", reason="needs fastapi: pip install foreroute[serve]")

from starlette.testclient import TestClient

from foreroute.server.app import create_app
from foreroute.server.backend import Backend, Prompts, Serving
from foreroute.server.settings import Limits, ServerSettings
from tests.cli.harness import SPECIAL, make_tokenizer
from tests.server.fake_engine import FakeEngine

CONTEXT = 64


class Served(NamedTuple):
    """client: speaks to the server. engine: what answers. backend: what is behind the routes."""

    client: TestClient
    engine: FakeEngine
    backend: Backend

    def chat(self, text: str = "Hi", **more: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], **more}
        return self.client.post("/v1/chat/completions", json=body)

    def complete(self, prompt: Any = "Hi", **more: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": prompt, **more})


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def prompts(byte_tokenizer: Any) -> Iterator[Prompts]:
    """Of the byte tokenizer; its template worker serves all tests."""
    made = Prompts(byte_tokenizer, len(SPECIAL) + 256, Limits())
    yield made
    made.close()


@pytest.fixture
def serve(byte_tokenizer: Any, prompts: Prompts) -> Iterator[Callable[..., Served]]:
    """`serve(settings, tokenizer, prompts, **FakeEngine arguments)`."""
    opened: list[TestClient] = []

    def serving(
        settings: ServerSettings | None = None, own_prompts: Prompts | None = None, tokenizer: Any = None, **fake: Any
    ) -> Served:
        engine = FakeEngine(tokenizer or byte_tokenizer, **{"context": CONTEXT, **fake})
        info = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "chat_template": "x"}
        backend = Backend(Serving(engine, own_prompts or prompts, engine.context, info))
        app = create_app(backend, settings or ServerSettings(served_names=("tiny", "other")))
        client = TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)
        client.__enter__()
        opened.append(client)
        return Served(client, engine, backend)

    yield serving
    for client in opened:
        client.__exit__(None, None, None)
