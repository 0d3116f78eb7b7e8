"""What is refused, and how: always in OpenAI's shape, by name, before anything is queued."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from foreroute.server.api.problems import ApiError
from foreroute.server.api.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from foreroute.server.api.strict import MOST_MESSAGES, MOST_PARTS
from foreroute.server.backend import Backend
from foreroute.server.settings import Limits, ServerSettings
from tests.server.conftest import Served

Serve = Callable[..., Served]
HI = [{"role": "user", "content": "Hi"}]
FUNCTION = {"type": "function", "function": {"name": "f"}}


def error_of(response: Any, status: int) -> dict[str, Any]:
    """The error, after its shape was checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hi"}, "messages", "invalid_value"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, None, "invalid_value"),
        # This template has no place for tools.
        ({"messages": [{"role": "tool", "content": "5", "tool_call_id": "x"}]}, "messages", "unsupported_parameter"),
        ({"messages": HI, "tools": [FUNCTION]}, "tools", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "Hi", "nam": "Bo"}]}, "messages.0.nam", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": "Hi", "audio": {"id": "a"}}]}, "messages", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "Hi", "reasoning": "hm"}]}, "messages", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
            "messages",
            "unsupported_parameter",
        ),
        ({"messages": HI, "max_tokens": -5}, "max_tokens", "invalid_value"),
        ({"messages": HI, "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"messages": HI, "max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"messages": HI, "max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "invalid_value"),
        # The longest number that Python reads; one more is longer than it writes.
        ({"messages": HI, "max_tokens": int("9" * 4300)}, "max_tokens", "invalid_value"),
        ({"messages": HI, "max_completion_tokens": 2**31}, "max_completion_tokens", "invalid_value"),
        ({"messages": HI, "n": int("9" * 4300)}, "n", "invalid_value"),
        ({"messages": HI, "repetition_penalty": 1e-300}, "repetition_penalty", "invalid_value"),
        ({"messages": HI, "temperature": 3}, "temperature", "invalid_value"),
        ({"messages": HI, "top_p": 0}, "top_p", "invalid_value"),
        ({"messages": HI, "n": 0}, "n", "invalid_value"),
        ({"messages": HI, "n": 17}, "n", "invalid_value"),
        ({"messages": HI, "n": 10**30}, "n", "invalid_value"),
        ({"messages": HI, "stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"messages": HI, "stop": "a" * 257}, "stop", "invalid_value"),
        ({"messages": HI, "logit_bias": {str(at): 1 for at in range(1025)}}, "logit_bias", "invalid_value"),
        ({"messages": HI, "logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"messages": HI, "logit_bias": {"\u00b2": 1}}, "logit_bias", "invalid_value"),
        ({"messages": HI, "logit_bias": {"1" * 5000: 1}}, "logit_bias", "invalid_value"),
        ({"messages": HI, "logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"messages": HI, "logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
        ({"messages": HI, "top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"messages": HI, "stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"messages": HI, "tools": [{"type": "function"}]}, "tools.0.function", "invalid_value"),
        ({"messages": HI, "tools": [{"type": "custom"}]}, "tools.0", "unsupported_parameter"),
        ({"messages": HI, "tools": [{"function": {"name": "a b"}}]}, "tools.0.function.name", "invalid_value"),
        ({"messages": HI, "tools": [{"function": {"name": "a", "parameters": 1}}]}, None, "invalid_value"),
        ({"messages": HI, "tools": [1]}, "tools.0", "invalid_value"),
        ({"messages": HI, "tools": [FUNCTION] * 1025}, "tools", "invalid_value"),
        ({"messages": HI, "tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"messages": HI, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", None),
        ({"messages": HI, "tool_choice": {"type": []}}, "tool_choice", "invalid_value"),
        ({"messages": HI, "response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"messages": HI, "reasoning_effort": "most"}, "reasoning_effort", "invalid_value"),
        ({"messages": HI, "chat_template": "{{ 1 }}"}, "chat_template", "unsupported_parameter"),
        ({"messages": HI, "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "unsupported_parameter"),
        ({"messages": HI, "tempurature": 1}, "tempurature", "unknown_parameter"),
        ({"messages": HI, "min_tokens": 3, "max_completion_tokens": 2}, "min_tokens", "invalid_value"),
    ],
)
def test_bad_chats(serve: Serve, body: dict[str, Any], param: str | None, code: str | None) -> None:
    served = serve()
    error = error_of(served.client.post("/v1/chat/completions", json=body), 400)
    assert error["type"] == "invalid_request_error"
    assert error["code"] == (code or "invalid_value")
    if param is not None:
        assert error["param"] == param
    assert served.engine.requests == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": "a", "max_tokens": int("9" * 4300)}, "max_tokens"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 64, "n": 3}, "n"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "min_tokens": -1}, "min_tokens"),
        ({"prompt": "a", "min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"prompt": "a", "stop_token_ids": [3]}, "stop_token_ids"),
    ],
)
def test_bad_completions(serve: Serve, body: dict[str, Any], param: str) -> None:
    served = serve()
    assert error_of(served.client.post("/v1/completions", json=body), 400)["param"] == param
    assert served.engine.requests == []


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        # A value that may be given in several ways: where it went wrong, in the way that went furthest.
        ("completions", {"prompt": 5}, "prompt", "valid string"),
        ("completions", {"prompt": ["a", 5]}, "prompt.1", "valid string"),
        ("completions", {"prompt": [[5], [5, "a"]]}, "prompt.1.1", "valid integer"),
        ("completions", {"prompt": "a", "stop": ["a", None]}, "stop.1", "valid string"),
        ("chat/completions", {"messages": [{"role": "user", "content": {}}]}, "messages.0.content", "valid string"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache": {}}]}]},
            "messages.0.content.0.cache",
            "no field",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
            "missing",
        ),
        # Names that are none in Python.
        ("completions", {"prompt": "a", "top-p": 1}, "top-p", "no field 'top-p'"),
        ("completions", {"prompt": "a", "str": 1}, "str", "no field 'str'"),
        ("completions", {"prompt": "a", "": 1}, None, "no field"),
        ("completions", {"prompt": "a", "k" * 100_000: 1}, "k" * 100 + " ...", "no field"),
        ("completions", {"prompt": "a", "logit_bias": {"5": 1, "05": 2}}, "logit_bias", "more than once"),
    ],
)
def test_what_is_wrong_is_named_in_short(
    serve: Serve, path: str, body: dict[str, Any], param: str | None, said: str
) -> None:
    error = error_of(serve().client.post(f"/v1/{path}", json=body), 400)
    assert error["param"] == param
    assert said in error["message"]
    assert len(error["message"]) < 1100


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt": "a", "max_tokens": 1, "prompt": "b"}',
        '{"prompt": "a", "stream_options": {"include_usage": true, "include_usage": false}}',
        '{"prompt": "a", "logit_bias": {"5": 1, "5": -100}}',
        '{"prompt": "a", "\\ud800": 1, "\\ud800": 2}',
    ],
)
def test_a_field_that_is_there_twice(serve: Serve, body: str) -> None:
    served = serve()
    headers = {"content-type": "application/json"}
    error = error_of(served.client.post("/v1/completions", content=body, headers=headers), 400)
    assert error["code"] == "invalid_json"
    assert "more than once" in error["message"]
    assert served.engine.requests == []


def test_what_asks_for_nothing_is_let_through(serve: Serve) -> None:
    served = serve(answer="ok")
    answer = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "audio": None}
    messages = [
        *HI,
        answer,
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    asked = {
        "messages": messages, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False,
        "user": "x", "metadata": {"a": "b"}, "service_tier": "auto", "stop": None, "n": None, "logit_bias": None,
        "functions": None,
    }  # fmt: skip
    assert served.client.post("/v1/chat/completions", json=asked).status_code == 200
    assert served.complete("a", best_of=1, suffix=None).status_code == 200
    # lm-eval sends an empty stop text where a model has no end token.
    assert served.complete("a", stop=["", "b"]).status_code == 200
    assert served.engine.requests[-1].stop == ["b"]


def test_a_model_that_is_not_here(serve: Serve) -> None:
    served = serve()
    assert error_of(served.chat(model="gpt-9"), 404)["code"] == "model_not_found"
    for path in ("../../etc/passwd", "/etc/passwd", "org/name", "tiny\0"):
        assert error_of(served.chat(model=path), 404)["code"] == "model_not_found"
        assert "passwd" not in served.chat(model=path).text
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        assert error_of(served.client.post(path, json={**body, "model": "gpt-9"}), 404)["param"] == "model"
        assert served.client.post(path, json={**body, "model": "other"}).status_code == 200
    assert served.chat(model="other").json()["model"] == "other"
    assert served.chat().json()["model"] == "tiny"


def test_paths_methods_bodies(serve: Serve) -> None:
    client = serve(ServerSettings(limits=Limits(body_bytes=1000, json_depth=8))).client
    assert error_of(client.get("/nowhere"), 404)["type"] == "not_found_error"
    assert error_of(client.get("/v1/chat/completions"), 405)["code"] == "method_not_allowed"
    assert error_of(client.post("/health", json={}), 405)
    assert client.head("/health").status_code == 200
    json_type = {"content-type": "application/json"}
    post = client.post
    assert error_of(post("/v1/completions", content=b"{", headers=json_type), 400)["code"] == "invalid_json"
    assert error_of(post("/v1/completions", content=b'{"prompt": NaN}', headers=json_type), 400)
    assert error_of(post("/v1/completions", content=b"\xff\xfe", headers=json_type), 400)
    assert error_of(post("/v1/completions", content=b'{"prompt": "\\ud800"}', headers=json_type), 400)
    assert error_of(post("/v1/completions", content=b"", headers=json_type), 400)
    assert error_of(post("/v1/completions", content=b"[]", headers=json_type), 400)
    too_long_number = b'{"prompt": "a", "seed": 1' + b"0" * 900 + b"}"
    assert error_of(post("/v1/completions", content=too_long_number, headers=json_type), 400)
    assert error_of(post("/v1/completions", json={"prompt": "a" * 1000}), 413)["code"] == "body_too_large"
    deep = b'{"prompt": ' + b"[" * 9 + b"]" * 9 + b"}"
    assert error_of(post("/v1/completions", content=deep, headers=json_type), 400)["code"] == "json_too_deep"
    bottomless = b"[" * 999
    assert error_of(post("/v1/completions", content=bottomless, headers=json_type), 400)


def test_a_body_of_no_announced_length_is_cut_off_too(serve: Serve) -> None:
    client = serve(ServerSettings(limits=Limits(body_bytes=1000))).client
    parts = (b" " * 300 for _ in range(5))
    response = client.post("/v1/completions", content=parts, headers={"content-type": "application/json"})
    assert error_of(response, 413)


def test_very_deep_json(serve: Serve) -> None:
    content = b'{"prompt":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    response = serve().client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert error_of(response, 400)["code"] == "json_too_deep"


def test_a_full_queue(serve: Serve) -> None:
    served = serve(most_open=2)
    served.engine.gate.clear()
    response = served.chat(n=3)
    assert error_of(response, 429)["code"] == "queue_full"
    assert response.headers["retry-after"] == "1"
    # Of three, two had been taken: they were given back.
    assert sorted(served.engine.cancelled) == [0, 1]
    assert served.engine.state().running == 0
    response = served.chat(n=3, stream=True)
    assert error_of(response, 429)
    served.engine.gate.set()
    assert served.chat(n=2).status_code == 200


def test_longer_than_the_context(serve: Serve) -> None:
    served = serve()
    error = error_of(served.chat("x" * 100, max_tokens=5), 400)
    assert error["code"] == "context_length_exceeded"
    assert "102" in error["message"]
    assert "64" in error["message"]
    error = error_of(served.complete("x" * 64, max_tokens=1, stream=True), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert served.engine.requests == []
    assert served.complete("abc", max_tokens=62).status_code == 200, "it ends at the context"


def test_before_the_model_is_there() -> None:
    from starlette.testclient import TestClient

    from foreroute.server.app import create_app

    backend = Backend()
    backend.report("reading the checkpoint", 0.5)
    with TestClient(create_app(backend, ServerSettings()), base_url="http://localhost") as client:
        health = client.get("/health")
        assert health.status_code == 503
        assert health.json() == {
            "status": "loading", "phase": "loading", "step": "reading the checkpoint", "progress": 0.5
        }  # fmt: skip
        for response in (
            client.get("/v1/models"),
            client.get("/tokenizer_info"),
            client.post("/v1/chat/completions", json={"messages": HI}),
        ):
            assert error_of(response, 503)["code"] == "loading"
            assert response.headers["retry-after"] == "1"
        assert client.get("/metrics").status_code == 200
        backend.fail("no memory")
        assert client.get("/health").json()["status"] == "failed"
    assert backend.phase == "stopping"


def test_a_bug_becomes_an_answer_and_no_quotation(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    served = serve()

    def broken(request: Any, on_event: Any) -> None:
        raise RuntimeError(f"secret prompt {request.prompt_ids}")

    served.engine.submit = broken
    error = error_of(served.chat("secret"), 500)
    assert error["type"] == "server_error"
    assert "secret" not in json.dumps(error)
    assert "RuntimeError" in caplog.text
    assert "test_errors.py" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([1, 2, -5], "prompt.2"),
        ([1, 2, "a"], "prompt.2"),
        (["a", "b", 3], "prompt.2"),
        ([[1, 2], [3, -1]], "prompt.1.1"),
        ([1.5, 2], "prompt.0"),
    ],
)
def test_the_element_that_is_wrong_is_named(serve: Serve, prompt: Any, param: str) -> None:
    assert error_of(serve().complete(prompt), 400)["param"] == param


MANY = 20_000


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": [1.5] * MANY}),
        (CompletionRequest, {"prompt": [[1.5] * MANY] * 2}),
        (CompletionRequest, {"prompt": "a", "stop": [5] * MANY}),
        (CompletionRequest, {"prompt": "a", **{f"x{at}": 1 for at in range(MANY)}}),
        (ChatRequest, {"messages": [5] * MOST_MESSAGES}),
        (ChatRequest, {"messages": [{"role": "user", "content": [5] * MOST_PARTS}] * 2}),
        (TokenizeRequest, {"messages": [{"role": "user", "content": "a", f"x{MANY}": 1}] * MOST_MESSAGES}),
        (DetokenizeRequest, {"tokens": [-1] * MANY}),
    ],
)
def test_a_wrong_body_is_not_told_apart_without_end(model: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() < 10


def test_too_many_biases_are_not_looked_at() -> None:
    with pytest.raises(ApiError, match="logit_bias"):
        ChatRequest.model_validate({"messages": HI, "logit_bias": {str(at): "a" for at in range(MANY)}})
