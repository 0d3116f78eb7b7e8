"""What stands behind the routes: a model that comes late, and a tokenizer that knows more tokens than the model."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest

from foreroute.server.backend import Backend, Prompts, Serving
from foreroute.server.settings import Limits
from tests.cli.harness import SPECIAL
from tests.server.conftest import Served

NUM_TOKENS = len(SPECIAL) + 256


class Closing:
    """Engine and prompts that note who closes them."""

    def __init__(self) -> None:
        self.num_closed = 0

    def close(self) -> None:
        self.num_closed += 1


def _served() -> tuple[Serving, Closing, Closing]:
    engine, prompts = Closing(), Closing()
    return Serving(engine, prompts, 64), engine, prompts  # type: ignore[arg-type]


def test_a_model_that_comes_after_the_end_is_closed() -> None:
    backend = Backend()
    serving, engine, prompts = _served()
    backend.stop()
    backend.report("reading the checkpoint", 0.5)
    backend.ready(serving)
    assert (engine.num_closed, prompts.num_closed) == (1, 1)
    assert (backend.phase, backend.step, backend.loaded) == ("stopping", "stopping", None)
    backend.fail("no memory")
    assert backend.phase == "stopping"


def test_ready_and_stop_at_once_leave_one_to_close_it() -> None:
    """Whoever comes first: the model is either closed, or there for the one who stops to close it."""
    for _ in range(200):
        backend = Backend()
        serving, engine, _ = _served()
        start = threading.Barrier(2)
        seen: list[Serving | None] = []

        def stop(backend: Backend = backend, start: threading.Barrier = start, seen: Any = seen) -> None:
            start.wait()
            backend.stop()
            seen.append(backend.loaded)

        stopping = threading.Thread(target=stop)
        stopping.start()
        start.wait()
        backend.ready(serving)
        stopping.join()
        assert backend.phase == "stopping"
        assert engine.num_closed == (0 if seen[0] is serving else 1)


@pytest.fixture
def with_a_token_too_many(serve: Callable[..., Served], byte_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_tokens(["<extra>"])
    assert tokenizer.convert_tokens_to_ids("<extra>") == NUM_TOKENS
    prompts = Prompts(tokenizer, NUM_TOKENS, Limits())
    yield serve(own_prompts=prompts, tokenizer=tokenizer)
    prompts.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_a_token_that_the_model_has_not(with_a_token_too_many: Served, path: str) -> None:
    served = with_a_token_too_many
    text = "Hi <extra>"
    asked = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    response = served.client.post(path, json=asked)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == ("messages" if "chat" in path else "prompt")
    assert str(NUM_TOKENS) in error["message"]
    assert served.engine.requests == []
    asked = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    assert served.client.post(path, json=asked).status_code == 200
