"""Numbers that JSON does not have: infinitely unlikely tokens have a number of their own, NaN is an error by name."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from foreroute.server.api.sse import event
from foreroute.server.watching.live import _event
from tests.server.conftest import Served

Serve = Callable[..., Served]
HI = [{"role": "user", "content": "Hi"}]
# Logprobs of the answer's tokens in chats and completions, and of the prompt's own.
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": HI, "logprobs": True, "top_logprobs": 2}),
    "completions": ("/v1/completions", {"prompt": "Hi", "logprobs": 2}),
    "prompt": ("/v1/completions", {"prompt": "Hi", "logprobs": 2, "echo": True, "max_tokens": 0}),
}


def _strictly(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _served(serve: Serve, logprob: float) -> Served:
    served = serve(answer="ok")
    served.engine._logprob = lambda token: logprob  # type: ignore[method-assign]
    return served


def _pieces(response: Any) -> list[Any]:
    assert response.text.endswith("data: [DONE]\n\n")
    return [_strictly(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]


def _logprobs(found: dict[str, Any]) -> list[float]:
    """All of them, wherever they are, in the order in which they come."""
    listed: list[float] = []

    def collect(one: Any, name: str = "") -> None:
        if isinstance(one, dict):
            for inner, value in one.items():
                collect(value, "logprob" if name == "top_logprobs" else inner)
        elif isinstance(one, list):
            for value in one:
                collect(value, name)
        elif isinstance(one, float) and name in ("logprob", "token_logprobs", "top_logprobs"):
            listed.append(one)

    collect(found)
    return listed


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", ASKED)
def test_an_infinitely_unlikely_token_has_the_least_logprob(serve: Serve, case: str, stream: bool) -> None:
    path, body = ASKED[case]
    response = _served(serve, -math.inf).client.post(path, json={**body, "stream": stream})
    found = {"all": _pieces(response) if stream else _strictly(response.text)}
    seen = _logprobs(found)
    assert seen
    assert set(seen) == {-9999.0}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", ASKED)
def test_no_number_at_all_is_an_error(serve: Serve, case: str, stream: bool) -> None:
    path, body = ASKED[case]
    served = _served(serve, math.nan)
    response = served.client.post(path, json={**body, "stream": stream})
    if not stream:
        assert response.status_code == 500
    error = (_pieces(response)[-1] if stream else _strictly(response.text))["error"]
    assert error["code"] == "engine_error"
    assert "nan" in error["message"]
    assert served.engine.state().running == 0
    # Who does not ask for logprobs gets the tokens.
    plain = {name: value for name, value in body.items() if name in ("messages", "prompt")}
    assert served.client.post(path, json=plain).status_code == 200


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_route_sends_what_is_no_json(serve: Serve, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        event({"value": value})
    with pytest.raises(ValueError, match="JSON"):
        _event("step", {"value": value})
    served = serve()
    serving = served.backend.loaded
    assert serving is not None
    serving.info["rope_theta"] = value
    serving.created = value  # type: ignore[assignment]
    served.backend.progress = value
    for path in ("/tokenizer_info", "/v1/models", "/health"):
        response = served.client.get(path)
        assert "NaN" not in response.text
        assert "Infinity" not in response.text
        _strictly(response.text)
